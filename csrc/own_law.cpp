// What a library of one law of one's own shows (loaded_law.h). Compiled by dml_cuda.load_law, never into the
// package.
#include "loaded_law.h"

namespace dml {

namespace cpu {
#define DML_DECLARE(isa)                                               \
    namespace isa {                                                    \
    template <typename T>                                              \
    const TileKernels<T>& kernels(LawId law);                          \
    extern template const TileKernels<float>& kernels<float>(LawId);   \
    extern template const TileKernels<double>& kernels<double>(LawId); \
    }
DML_DECLARE(baseline)
#if defined(DML_WITH_AVX2)
DML_DECLARE(avx2)
#endif
#if defined(DML_WITH_AVX512)
DML_DECLARE(avx512)
#endif
#undef DML_DECLARE
}  // namespace cpu

#if defined(DML_WITH_CUDA)
namespace cuda {
extern const EntryPoints kEntryPoints;
}
#endif

namespace {

#define DML_SET(isa) {#isa, &cpu::isa::kernels<float>(kLaws[0].id), &cpu::isa::kernels<double>(kLaws[0].id)},

const LoadedLaw* loaded_law() {
    static const LoadedLaw::Set sets[] = {DML_SET(baseline)
#if defined(DML_WITH_AVX2)
                                              DML_SET(avx2)
#endif
#if defined(DML_WITH_AVX512)
                                                  DML_SET(avx512)
#endif
                                                      {}};
    static const LoadedLaw law = {kLoadedLawLayout, kOwnParameters, sets,
#if defined(DML_WITH_CUDA)
                                  &cuda::kEntryPoints
#else
                                  nullptr
#endif
    };
    return &law;
}

}  // namespace
}  // namespace dml

extern "C" __attribute__((visibility("default"))) const dml::LoadedLaw* dml_loaded_law() {
    return dml::loaded_law();
}
