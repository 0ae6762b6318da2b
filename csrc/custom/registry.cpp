#include "custom/registry.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <mutex>
#include <stdexcept>

namespace dml {
namespace {

constexpr int kListed = static_cast<int>(std::size(kLaws)), kMostLoaded = 4096;

struct Entry {
    std::string name;
    LawInfo info;
    const LoadedLaw* law;
};

// Grows only, and an entry is complete before the count tells of it: so it is read without a lock.
Entry entries[kMostLoaded];
std::atomic<int> entry_count{0};
std::mutex loading;

const LoadedLaw* open(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(dlerror());
    const auto get = reinterpret_cast<LoadedLawFunction>(dlsym(library, kLoadedLawSymbol));
    const LoadedLaw* law = get ? get() : nullptr;
    if (!law || !std::equal(std::begin(kLoadedLawLayout), std::end(kLoadedLawLayout), law->layout)) {
        dlclose(library);
        throw std::runtime_error(path + " was not made from the sources of this dml_cuda");
    }
    return law;  // the library stays: who loaded a law may use it to the end
}

}  // namespace

const LoadedLaw* loaded_law(LawId id) {
    const int k = static_cast<int>(id) - kListed;
    return k < 0 ? nullptr : entries[k].law;
}

const LawInfo* law_named(std::string_view name) {
    for (const LawInfo& law : kLaws) {
        if (law.name == name) return &law;
    }
    const int count = entry_count.load(std::memory_order_acquire);
    for (int k = 0; k < count; ++k) {
        if (entries[k].info.name == name) return &entries[k].info;
    }
    return nullptr;
}

const LawInfo& load_law(const std::string& path, const std::string& name) {
    const std::lock_guard<std::mutex> guard(loading);
    if (const LawInfo* known = law_named(name)) return *known;
    const int k = entry_count.load(std::memory_order_relaxed);
    if (k == kMostLoaded) throw std::runtime_error("too many laws in one process");
    Entry& entry = entries[k];
    entry.law = open(path);
    entry.name = name;
    entry.info = {entry.name, static_cast<LawId>(kListed + k), count_names(entry.law->parameters)};
    entry_count.store(k + 1, std::memory_order_release);
    return entry.info;
}

}  // namespace dml
