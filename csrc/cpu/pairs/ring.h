// The stages of a forward pass that gets its columns block by block (ring.cpp).
#pragma once

#include <string>
#include <vector>

namespace dml::cpu {

// The stages of a formula's forward pass. Each stage adds every block.
std::vector<std::string> stages(const std::string& formula, bool mining);

}  // namespace dml::cpu
