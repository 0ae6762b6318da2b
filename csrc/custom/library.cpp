// What a library of one formula of one's own shows (custom_formula.h). Compiled by dml_cuda.load_formula,
// never into the package.
#include "custom/library.h"

namespace dml {

namespace cpu {
// The one instruction set that it is compiled for.
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
