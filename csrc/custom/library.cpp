// The exported function of a custom formula's library (library.h). dml_cuda.compile_loss compiles it; the
// package does not contain it.
#include "custom/library.h"

namespace dml {

namespace cpu {
// The kernels for the library's one instruction set.
namespace DML_CUSTOM_ISA {
template <typename T>
const TileKernels<T>& kernels(FormulaId formula);
extern template const TileKernels<float>& kernels<float>(FormulaId);
extern template const TileKernels<double>& kernels<double>(FormulaId);
}  // namespace DML_CUSTOM_ISA
}  // namespace cpu

#if defined(DML_WITH_CUDA)
namespace cuda {
extern const EntryPoints kEntryPoints;
}
#endif

namespace {

#define DML_QUOTE(isa) #isa
#define DML_QUOTED(isa) DML_QUOTE(isa)

const CustomFormula* custom_formula() {
    static const CustomFormula formula = {kCustomFormulaLayout,
                                          kCustomParameters,
                                          DML_QUOTED(DML_CUSTOM_ISA),
                                          &cpu::DML_CUSTOM_ISA::kernels<float>(kFormulas[0].id),
                                          &cpu::DML_CUSTOM_ISA::kernels<double>(kFormulas[0].id),
#if defined(DML_WITH_CUDA)
                                          &cuda::kEntryPoints
#else
                                          nullptr
#endif
    };
    return &formula;
}

}  // namespace
}  // namespace dml

extern "C" __attribute__((visibility("default"))) const dml::CustomFormula* dml_custom_formula() {
    return dml::custom_formula();
}
