// The laws that this process has loaded (loaded_law.h). Their ids follow those of the list.
#pragma once

#include <string>

#include "custom/library.h"

namespace dml {

// Null for a law of the list.
const LoadedLaw* loaded_law(LawId id);

// Of the list or loaded; null for a name that is neither.
const LawInfo* law_named(std::string_view name);

// Takes a law out of a library, under a name. Throws std::runtime_error for a library that does not fit; a
// name that is there already stays what it was.
const LawInfo& load_law(const std::string& path, const std::string& name);

}  // namespace dml
