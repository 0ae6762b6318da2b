// The arithmetic of backward's weights times points on tiles, and how the weights lie in images.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

// Weights have the range of floats, which float16 lacks: an image of float16 parts has a power of two for each of a
// tile's lines (WeightMath).
template <typename Math>
struct GradMathOf {
    using Type = Math;
};
template <>
struct GradMathOf<HalfMath<__half>> {
    using Type = WeightMath<__half, 1>;
};
template <int Parts>
struct GradMathOf<ScaledMath<Parts>> {
    using Type = WeightMath<float, Parts>;
};

template <typename GradMath>
struct WeightLayoutOf {
    using Type = ImageLayout<typename GradMath::Value, kTileSide<typename GradMath::Acc>, 1>;
};
template <typename T, int Parts>
struct WeightLayoutOf<WeightMath<T, Parts>> {
    using Type = ImageLayout<__half, kTileSide<float>, Parts>;
};
template <typename Math>
using WeightLayout = typename WeightLayoutOf<typename GradMathOf<Math>::Type>::Type;

}  // namespace dml::cuda
