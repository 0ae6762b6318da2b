// Products of tiles: their shape, and how many a multiprocessor computes at a time.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

// Arithmetic whose tiles need the registers of two thread blocks.
template <typename Math>
inline constexpr bool kNeedsManyRegisters = false;
template <typename T>
inline constexpr bool kNeedsManyRegisters<SimtMath<T>> = true;
template <typename T>
inline constexpr bool kNeedsManyRegisters<Tf32Math<T, true>> = true;
template <>
inline constexpr bool kNeedsManyRegisters<ScaledMath<2>> = true;
template <typename T>
inline constexpr bool kNeedsManyRegisters<WeightMath<T, 2>> = true;

// Thread blocks of a product of tiles per multiprocessor: of two, one multiplies while the other begins or ends. From
// sm_120 on shared memory holds one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
template <typename Math>
inline constexpr int kProductBlocks = 1;
#else
template <typename Math>
inline constexpr int kProductBlocks = kNeedsManyRegisters<Math> ? 1 : 2;
#endif

template <typename Math>
using SquareTile = Shape<kTileSide<typename Math::Acc>, kTileSide<typename Math::Acc>, 2, 4, false>;

}  // namespace dml::cuda
