// The registry of loaded custom formulas.
#include "custom/registry.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <mutex>
#include <stdexcept>

namespace dml {
namespace {

constexpr int kListed = static_cast<int>(std::size(kFormulas)), kMostLoaded = 4096;

struct Entry {
    std::string name;
    FormulaInfo info;
    const CustomFormula* formula;
};

// Entries are only added, and complete before entry_count includes them, so readers need no lock.
Entry entries[kMostLoaded];
std::atomic<int> entry_count{0};
std::mutex loading;

const CustomFormula* open(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(dlerror());
    const auto get = reinterpret_cast<CustomFormulaFunction>(dlsym(library, kCustomFormulaSymbol));
    const CustomFormula* formula = get ? get() : nullptr;
    if (!formula ||
        !std::equal(std::begin(kCustomFormulaLayout), std::end(kCustomFormulaLayout), formula->layout)) {
        dlclose(library);
        throw std::runtime_error(path + " was not made from the sources of this dml_cuda");
    }
    return formula;  // the library stays open: its formula may be used until the process ends
}

}  // namespace

const CustomFormula* custom_formula(FormulaId id) {
    const int k = static_cast<int>(id) - kListed;
    return k < 0 ? nullptr : entries[k].formula;
}

const FormulaInfo* formula_named(std::string_view name) {
    for (const FormulaInfo& formula : kFormulas) {
        if (formula.name == name) return &formula;
    }
    const int count = entry_count.load(std::memory_order_acquire);
    for (int k = 0; k < count; ++k) {
        if (entries[k].info.name == name) return &entries[k].info;
    }
    return nullptr;
}

const FormulaInfo& load_formula(const std::string& path, const std::string& name) {
    const std::lock_guard<std::mutex> guard(loading);
    if (const FormulaInfo* known = formula_named(name)) return *known;
    const int k = entry_count.load(std::memory_order_relaxed);
    if (k == kMostLoaded) throw std::runtime_error("too many formulas in one process");
    Entry& entry = entries[k];
    entry.formula = open(path);
    entry.name = name;
    entry.info = {entry.name, static_cast<FormulaId>(kListed + k), count_names(entry.formula->parameters)};
    entry_count.store(k + 1, std::memory_order_release);
    return entry.info;
}

}  // namespace dml
