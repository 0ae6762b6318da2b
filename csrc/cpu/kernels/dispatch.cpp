// The tables of kernels for the instruction set in use: at first the widest that this machine has.
#include <stdexcept>
#include <type_traits>

#include "cpu/kernels/center_kernels.h"
#include "cpu/kernels/listed_kernels.h"
#include "cpu/kernels/product_kernels.h"
#include "cpu/kernels/tile_kernels.h"
#include "cpu/kernels/triplet_kernels.h"
#include "custom/registry.h"

// Sanitizer builds compile the baseline alone.
#if defined(__x86_64__) && !defined(DML_BASELINE_ONLY)
#define DML_HAS_AVX 1
#else
#define DML_HAS_AVX 0
#endif

namespace dml::cpu {

#define DML_DECLARE(isa)                                                   \
    namespace isa {                                                        \
    template <typename T>                                                  \
    const TileKernels<T>& kernels(FormulaId formula);                      \
    extern template const TileKernels<float>& kernels<float>(FormulaId);   \
    extern template const TileKernels<double>& kernels<double>(FormulaId); \
    template <typename T>                                                  \
    const ListedKernels<T>& listed();                                      \
    extern template const ListedKernels<float>& listed<float>();           \
    extern template const ListedKernels<double>& listed<double>();         \
    template <typename T>                                                  \
    const ProductKernels<T>& tile_products();                              \
    extern template const ProductKernels<float>& tile_products<float>();   \
    extern template const ProductKernels<double>& tile_products<double>(); \
    template <typename T>                                                  \
    const TripletKernels<T>& triplets();                                   \
    extern template const TripletKernels<float>& triplets<float>();        \
    extern template const TripletKernels<double>& triplets<double>();      \
    template <typename T>                                                  \
    const CenterKernels<T>& centers();                                     \
    extern template const CenterKernels<float>& centers<float>();          \
    extern template const CenterKernels<double>& centers<double>();        \
    }
DML_DECLARE(baseline)
#if DML_HAS_AVX
DML_DECLARE(avx2)
DML_DECLARE(avx512)
#endif
#undef DML_DECLARE

std::vector<std::string> available_instruction_sets() {
    std::vector<std::string> names = {"baseline"};
#if DML_HAS_AVX
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) names.push_back("avx2");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        names.push_back("avx512");
    }
#endif
    return names;
}

namespace {
std::string& chosen() {
    static std::string name = available_instruction_sets().back();
    return name;
}
}  // namespace

std::string instruction_set() { return chosen(); }

void set_instruction_set(const std::string& name) {
    for (const std::string& available : available_instruction_sets()) {
        if (available == name) {
            chosen() = name;
            return;
        }
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

namespace {
template <typename T>
const TileKernels<T>& custom_kernels(const CustomFormula& formula) {
    if (chosen() != formula.instruction_set)
        throw std::runtime_error(std::string("a formula was loaded with kernels for ") +
                                 formula.instruction_set + ", and " + chosen() +
                                 " is in use now: load it again");
    if constexpr (std::is_same_v<T, float>) {
        return *formula.of_float;
    } else {
        return *formula.of_double;
    }
}
}  // namespace

// A call of the function of the instruction set in use.
#if DML_HAS_AVX
#define DML_CHOSEN(call) \
    (chosen() == "avx512" ? avx512::call : chosen() == "avx2" ? avx2::call : baseline::call)
#else
#define DML_CHOSEN(call) baseline::call
#endif

template <typename T>
const TileKernels<T>& tile_kernels(FormulaId formula) {
    if (const CustomFormula* custom = custom_formula(formula)) return custom_kernels<T>(*custom);
    return DML_CHOSEN(kernels<T>(formula));
}

template const TileKernels<float>& tile_kernels<float>(FormulaId);
template const TileKernels<double>& tile_kernels<double>(FormulaId);

template <typename T>
const ListedKernels<T>& listed_kernels() {
    return DML_CHOSEN(listed<T>());
}

template const ListedKernels<float>& listed_kernels<float>();
template const ListedKernels<double>& listed_kernels<double>();

template <typename T>
const ProductKernels<T>& product_kernels() {
    return DML_CHOSEN(tile_products<T>());
}

template const ProductKernels<float>& product_kernels<float>();
template const ProductKernels<double>& product_kernels<double>();

template <typename T>
const TripletKernels<T>& triplet_kernels() {
    return DML_CHOSEN(triplets<T>());
}

template const TripletKernels<float>& triplet_kernels<float>();
template const TripletKernels<double>& triplet_kernels<double>();

template <typename T>
const CenterKernels<T>& center_kernels() {
    return DML_CHOSEN(centers<T>());
}

template const CenterKernels<float>& center_kernels<float>();
template const CenterKernels<double>& center_kernels<double>();

}  // namespace dml::cpu
