// Laws of one's own, which dml_cuda._C loads, are not known here.
#pragma once

#include "custom/registry.h"

namespace dml {
const LoadedLaw* loaded_law(LawId) { return nullptr; }
const LawInfo* law_named(std::string_view name) {
    for (const LawInfo& law : kLaws) {
        if (law.name == name) return &law;
    }
    return nullptr;
}
}  // namespace dml
