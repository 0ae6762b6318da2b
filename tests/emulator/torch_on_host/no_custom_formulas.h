// The registry of loaded formulas (csrc/custom), without any.
#pragma once

#include "custom/registry.h"

namespace dml {
const CustomFormula* custom_formula(FormulaId) { return nullptr; }
const FormulaInfo* formula_named(std::string_view name) {
    for (const FormulaInfo& formula : kFormulas) {
        if (formula.name == name) return &formula;
    }
    return nullptr;
}
}  // namespace dml
