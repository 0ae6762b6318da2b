// Whether the tiles' products are by wgmma: where they are asked for, of a build that has code for sm_90a, on a GPU that
// runs it.
#pragma once

#include "cuda/common/launch.h"

// Whether this pass of the compiler knows wgmma: the emulator's; nvcc's for the host, and for sm_90a.
#if defined(DML_CUDA_ON_HOST)
#define DML_COMPILES_WGMMA 1
#elif defined(DML_BUILDS_SM90A)
#define DML_COMPILES_WGMMA (!defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL))
#else
#define DML_COMPILES_WGMMA 0
#endif

namespace dml::cuda {

inline constexpr int kProductTile = 128, kWgmmaThreads = 288;  // of the kernels: tile_product.cuh

// asked: by asks_for_wgmma (pairs/pair_loss.h), or by a test.
inline bool takes_wgmma(bool asked) {
#if DML_COMPILES_WGMMA
    return asked && device_limits().compute_capability == 90;
#else
    static_cast<void>(asked);
    return false;
#endif
}

}  // namespace dml::cuda
