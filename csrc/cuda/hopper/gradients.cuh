// The gradients of a tile group by wgmma: add_gradients with another product, of panels of 128 columns.
#pragma once

#include "cuda/hopper/similarities.cuh"
#include "cuda/pairs/tile_backward.cuh"

namespace dml::cuda {

#if DML_COMPILES_WGMMA

// Weights with a scale for each row are joined, slice by slice.
template <typename Math>
using WgmmaGradient = TileProduct<typename WeightLayout<Math>::Element, WeightLayout<Math>::kParts,
                                  kScalesWeights<WeightLayout<Math>>>;
template <typename Math>
inline constexpr int kWgmmaGradientBytes =
    WgmmaGradient<Math>::kSharedBytes + 2 * kListSize * int(sizeof(int));

// The slices of a line's tiles, two of each tile: of weights, which lie K-major where the line is a row of tiles and
// M-major where it is a column, and of two blocks of the points' columns.
template <bool Transposed>
struct LineSlices {
    static constexpr Major kMajor = Transposed ? Major::kMn : Major::kK;
    TilesOfLine tiles;

    DML_DEVICE int count() const { return 2 * tiles.count; }
    DML_DEVICE int tile(int slice) const { return tiles.list[slice / 2]; }
    DML_DEVICE SlicePlace weights(int slice) const {
        const int half = slice % 2;
        return {tiles.slot(tile(slice)), Transposed ? 0 : half, half};
    }
    DML_DEVICE SlicePlace points(int slice, int block) const { return {tile(slice), block, slice % 2}; }

    template <typename Product>
    DML_DEVICE void produce(Product& product, const Image& weights_image, const Image& points_image,
                            int block) const {
        product.template produce<kMajor, Major::kMn>(
            weights_image, [&](int slice) { return weights(slice); }, points_image,
            [&](int slice) { return points(slice, block); }, count());
    }
    template <typename Product>
    DML_DEVICE void consume(Product& product, float (&sums)[kWgmmaRegisters],
                            const Image& weights_image) const {
        product.template consume<kMajor, Major::kMn>(sums, count(), [&](int slice) {
            const float* of_tile = weights_image.scales + tiles.slot(tile(slice)) * kProductTile;
            return RowScales{{of_tile[WgmmaTile::row(0)], of_tile[WgmmaTile::row(2)]}};
        });
    }
};

#else

template <typename Math>
inline constexpr int kWgmmaGradientBytes = 0;

#endif

template <typename Math>
__global__ void __launch_bounds__(kWgmmaThreads, kScalesWeights<WeightLayout<Math>> ? 1 : 2)
    wgmma_gradients(const __grid_constant__ TileGroup<float> all,
                    const __grid_constant__ Gradients<float> gradients, const uint8_t* kept,
                    GroupWeights<WeightLayout<Math>> weights) {
#if DML_COMPILES_WGMMA
    wait_for_previous_kernel();
    let_next_kernel_start();
    const OwnedGradient<float> owned = {all, gradients, int64_t(blockIdx.x) * kProductTile, kProductTile};
    if (!owned.is_wanted()) return;
    const auto tile_group = all.in_use();
    WgmmaGradient<Math> product;
    int* lists = pattern_aligned_array<int>(WgmmaGradient<Math>::kSharedBytes, 2 * kListSize);
    LineSlices<false> row = {};
    LineSlices<true> column = {};
    if (owned.has_row()) row.tiles = kept_tiles<false>(tile_group, owned.line(), owned.part(), kept, lists);
    if (owned.has_column())
        column.tiles = kept_tiles<true>(tile_group, owned.line(), owned.part(), kept, lists + kListSize);
    product.init_barriers();
    if (product.is_producer()) {
        const int block = 2 * int(blockIdx.x);
        row.produce(product, weights.image(0), tile_group.col_image, block);
        column.produce(product, weights.image(1), tile_group.row_image, block);
        return;
    }
    float sums[kWgmmaRegisters] = {};
    row.consume(product, sums, weights.image(0));
    column.consume(product, sums, weights.image(1));
    owned.add(WgmmaTile{sums});
#endif
}

}  // namespace dml::cuda
