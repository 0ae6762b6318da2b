// What a library of one law of one's own shows (loaded_law.h). Compiled by dml_cuda.load_law, never into the
// package.
#include "custom/library.h"

namespace dml {

namespace cpu {
// The one instruction set that it is compiled for.
namespace DML_LAW_ISA {
template <typename T>
const TileKernels<T>& kernels(LawId law);
extern template const TileKernels<float>& kernels<float>(LawId);
extern template const TileKernels<double>& kernels<double>(LawId);
}  // namespace DML_LAW_ISA
}  // namespace cpu

#if defined(DML_WITH_CUDA)
namespace cuda {
extern const EntryPoints kEntryPoints;
}
#endif

namespace {

#define DML_QUOTE(isa) #isa
#define DML_QUOTED(isa) DML_QUOTE(isa)

const LoadedLaw* loaded_law() {
    static const LoadedLaw law = {kLoadedLawLayout,
                                  kOwnParameters,
                                  DML_QUOTED(DML_LAW_ISA),
                                  &cpu::DML_LAW_ISA::kernels<float>(kLaws[0].id),
                                  &cpu::DML_LAW_ISA::kernels<double>(kLaws[0].id),
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
