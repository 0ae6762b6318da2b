// What a law declares, by name.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace dml::cpu {

// The parameters of a loaded law as it states them; and its declarations (laws/law.h), and whether it has
// CUDA kernels.
using LawFacts = std::pair<std::string, std::map<std::string, bool>>;
LawFacts law_facts(std::string_view name);

}  // namespace dml::cpu
