// The arithmetic of backward's weights times points, and the type of the weights.
#pragma once

#include "cuda/common/math.cuh"

namespace dml::cuda {

// The arithmetic of weights times points. Weights have the range of floats, which float16 lacks: beside them a tile
// keeps a power of two for each of its lines (WeightMath).
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

// The type that weights are stored in: what a product in GradMath would round them to anyway. Big parts of float16 have
// as many digits as tf32.
template <typename GradMath>
struct WeightOf {
    using Type = typename GradMath::Acc;
};
template <typename T>
struct WeightOf<HalfMath<T>> {
    using Type = T;
};
template <typename T>
struct WeightOf<Tf32Math<T, false>> {
    using Type = RoundedToTf32;
};
template <typename T>
struct WeightOf<WeightMath<T, 1>> {
    using Type = RoundedToTf32;
};

}  // namespace dml::cuda
