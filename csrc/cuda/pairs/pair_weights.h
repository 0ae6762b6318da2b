// The weights of a tile group, which backward multiplies the points by.
#pragma once

#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

// Float16 has not the range of weights, which bfloat16 and double have: then there are two images, of weights scaled by
// a power of two for each row of a tile, and for each column.
template <typename Layout>
inline constexpr bool kScalesWeights = std::is_same_v<typename Layout::Element, __half>;

// Images of a tile group's weights, a tile of them in each slot: for its rows and for its columns. Where they are scaled
// they include the scales of the points that they are multiplied by; else they are one image.
template <typename Layout>
struct GroupWeights {
    using Acc = std::conditional_t<sizeof(typename Layout::Element) == 8, double, float>;
    static constexpr int kTile = Layout::kRows, kTileBytes = int(Layout::tile_bytes(kTile));
    static constexpr int kPlaceBytes = kTile * kTile * int(sizeof(Acc));  // of a tile's similarities
    // Both images lie in the place of the similarities where that has room.
    static constexpr int kPlaces = kScalesWeights<Layout> && 2 * kTileBytes > kPlaceBytes ? 2 : 1;
    static constexpr int kScaleBytes = kScalesWeights<Layout> ? 2 * kTile * int(sizeof(float)) : 0;
    static constexpr int64_t kBytes = int64_t(kPlaces) * kPlaceBytes + kScaleBytes;  // of a slot
    static_assert(kPlaceBytes % Layout::kBlockBytes == 0 && kTileBytes <= kPlaceBytes,
                  "whole blocks in a place");

    unsigned char* images[2];  // of rows, of columns: [slots][kPlaceBytes]
    float* scales[2];          // [slots, kTile]; null: 1

    GroupWeights() = default;
    GroupWeights(unsigned char* bytes, int64_t slots)
        : images{bytes, bytes + (!kScalesWeights<Layout> ? 0
                                 : kPlaces == 2          ? slots * kPlaceBytes
                                                         : kTileBytes)} {
        auto* numbers = reinterpret_cast<float*>(bytes + slots * kPlaces * kPlaceBytes);
        for (const int side : {0, 1})
            scales[side] = kScalesWeights<Layout> ? numbers + side * slots * kTile : nullptr;
    }
    // Whose tiles are the slots.
    DML_INLINE Image image(int side) const {
        return {images[side], scales[side], kPlaceBytes / Layout::kBlockBytes};
    }
};

}  // namespace dml::cuda
