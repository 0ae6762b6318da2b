// The interface of a library that dml_cuda.compile_loss builds for one custom formula.
//
// The library is compiled from this package's sources with that formula as the list of formulas (library.cpp,
// the tile kernels, the CUDA engine). It shares no symbol with the package and does not use torch.
#pragma once

#include "core/problem.h"
#include "cpu/kernels/tile_kernels.h"

namespace dml {

namespace cuda {
struct EntryPoints;
}

// Equal in the package and the library if both were compiled from the same headers.
inline constexpr int64_t kCustomFormulaLayout[] = {sizeof(cpu::TileKernels<float>), sizeof(cpu::Tile<double>),
                                                   sizeof(cpu::TileParts<float>), sizeof(Problem),
                                                   kMaxParams};

struct CustomFormula {
    const int64_t* layout;
    const char* parameters;       // "alpha, beta = 50"
    const char* instruction_set;  // that the CPU kernels are compiled for
    const cpu::TileKernels<float>* of_float;
    const cpu::TileKernels<double>* of_double;
    const cuda::EntryPoints* cuda;  // null without CUDA kernels
};

// The one exported function, named kCustomFormulaSymbol.
using CustomFormulaFunction = const CustomFormula* (*)();
inline constexpr char kCustomFormulaSymbol[] = "dml_custom_formula";

}  // namespace dml
