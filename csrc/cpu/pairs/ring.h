// The stages of a ring's forward pass (ring.cpp).
#pragma once

#include <string>
#include <vector>

namespace dml::cpu {

// The stages of a formula's forward pass; every block is added in each, and the rows turn after it.
std::vector<std::string> stages(const std::string& formula, bool mining);

}  // namespace dml::cpu
