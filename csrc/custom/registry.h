// The formulas that this process has loaded (custom_formula.h). Their ids follow those of the list.
#pragma once

#include <string>

#include "custom/library.h"

namespace dml {

// Null for a formula of the list.
const CustomFormula* custom_formula(FormulaId id);

// Of the list or loaded; null for a name that is neither.
const FormulaInfo* formula_named(std::string_view name);

// Takes a formula out of a library, under a name. Throws std::runtime_error for a library that does not fit;
// a name that is there already stays what it was.
const FormulaInfo& load_formula(const std::string& path, const std::string& name);

}  // namespace dml
