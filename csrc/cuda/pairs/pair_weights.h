// The weights of a tile group, which backward multiplies the points by.
#pragma once

#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

// A tile group's weights, a tile in the place of its similarities; and where they are scaled the powers of two of each
// tile's rows and columns.
template <typename Weight, typename Acc>
struct GroupWeights {
    static constexpr int kPlace = kTileSide<Acc> * kTileSide<Acc> * int(sizeof(Acc) / sizeof(Weight));
    Weight* weights;  // [slots, kPlace], of which the first kTile x kTile
    float* ups;       // [slots, 2, kTile]
};

// Weights of this type have powers of two: the others are bfloat16, which has the range of floats, and double.
template <typename Weight>
inline constexpr bool kScalesWeights = sizeof(Weight) == 4;

}  // namespace dml::cuda
