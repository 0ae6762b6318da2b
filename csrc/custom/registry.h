// The custom formulas that this process has loaded. Their ids follow those of losses/list.h.
#pragma once

#include <string>

#include "custom/library.h"

namespace dml {

// Null for a formula of losses/list.h.
const CustomFormula* custom_formula(FormulaId id);

// A formula of losses/list.h or a loaded one; null for an unknown name.
const FormulaInfo* formula_named(std::string_view name);

// Loads a formula from a library and registers it under a name; a registered name keeps its formula. Throws
// std::runtime_error for a library of other sources.
const FormulaInfo& load_formula(const std::string& path, const std::string& name);

}  // namespace dml
