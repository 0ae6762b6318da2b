// A law that was compiled after the package, by dml_cuda.load_law: what its library hands over.
//
// The library is made of this package's sources with one law in the list (own_law.cpp, the tile kernels,
// the CUDA engine), shares no symbol with it, and needs nothing of torch.
#pragma once

#include "cpu/kernels/tile_kernels.h"
#include "core/problem.h"

namespace dml {

namespace cuda {
struct EntryPoints;
}

// The same numbers on both sides, if both were compiled from the same headers.
inline constexpr int64_t kLoadedLawLayout[] = {sizeof(cpu::TileKernels<float>), sizeof(cpu::Tile<double>),
                                               sizeof(cpu::TileParts<float>), sizeof(Problem), kMaxParams};

struct LoadedLaw {
    const int64_t* layout;
    const char* parameters;       // "alpha, beta = 50"
    const char* instruction_set;  // of the CPU kernels
    const cpu::TileKernels<float>* of_float;
    const cpu::TileKernels<double>* of_double;
    const cuda::EntryPoints* cuda;  // null where nvcc did not compile it
};

// The one function that a library shows, by the name kLoadedLawSymbol.
using LoadedLawFunction = const LoadedLaw* (*)();
inline constexpr char kLoadedLawSymbol[] = "dml_loaded_law";

}  // namespace dml
