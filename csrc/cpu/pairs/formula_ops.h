// What a formula declares, by name.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace dml::cpu {

// The parameters of a custom formula as it states them; and its declarations (losses/formula.h), and whether
// it has CUDA kernels.
using FormulaFacts = std::pair<std::string, std::map<std::string, bool>>;
FormulaFacts formula_facts(std::string_view name);

}  // namespace dml::cpu
