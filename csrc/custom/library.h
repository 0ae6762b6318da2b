// A formula that was compiled after the package, by dml_cuda.load_formula: what its library hands over.
//
// The library is made of this package's sources with one formula in the list (custom.cpp, the tile kernels,
// the CUDA engine), shares no symbol with it, and needs nothing of torch.
#pragma once

#include "core/problem.h"
#include "cpu/kernels/tile_kernels.h"

namespace dml {

namespace cuda {
struct EntryPoints;
}

// The same numbers on both sides, if both were compiled from the same headers.
inline constexpr int64_t kCustomFormulaLayout[] = {sizeof(cpu::TileKernels<float>), sizeof(cpu::Tile<double>),
                                                   sizeof(cpu::TileParts<float>), sizeof(Problem),
                                                   kMaxParams};

struct CustomFormula {
    const int64_t* layout;
    const char* parameters;       // "alpha, beta = 50"
    const char* instruction_set;  // of the CPU kernels
    const cpu::TileKernels<float>* of_float;
    const cpu::TileKernels<double>* of_double;
    const cuda::EntryPoints* cuda;  // null where nvcc did not compile it
};

// The one function that a library shows, by the name kCustomFormulaSymbol.
using CustomFormulaFunction = const CustomFormula* (*)();
inline constexpr char kCustomFormulaSymbol[] = "dml_custom_formula";

}  // namespace dml
