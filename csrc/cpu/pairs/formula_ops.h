// The declarations of a formula, for Python.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace dml::cpu {

// The kParams of a custom formula; the declarations of losses/formula.h by name, and whether it has CUDA
// kernels.
using FormulaFacts = std::pair<std::string, std::map<std::string, bool>>;
FormulaFacts formula_facts(std::string_view name);

}  // namespace dml::cpu
