// The similarities of a tile group by wgmma: tile_similarities with another product.
#pragma once

#include "cuda/hopper/wgmma_choice.h"
#include "cuda/pairs/tile_similarities.cuh"

#if DML_COMPILES_WGMMA
#include "cuda/hopper/tile_product.cuh"
#endif

namespace dml::cuda {

template <typename Math>
inline constexpr bool kHasWgmma = sizeof(typename PartsOf<Math>::Type) == 2;

#if DML_COMPILES_WGMMA

struct PatternAlignedArrays {
    template <typename T>
    static DML_DEVICE T* at(int byte_offset, int count) {
        return pattern_aligned_array<T>(byte_offset, count);
    }
};

// A barrier for the consumers, when the producer is gone.
struct ConsumerSync {
    DML_DEVICE void operator()() const { named_barrier_sync(1, kConsumers); }
};

template <typename Math>
using WgmmaProduct = TileProduct<typename PartsOf<Math>::Type, PartsOf<Math>::kCount>;
template <typename Math>
inline constexpr int kWgmmaSharedBytes = WgmmaProduct<Math>::kSharedBytes + TileLines<Math>::kBytes;

#else

template <typename Math>
inline constexpr int kWgmmaSharedBytes = 0;

#endif

// Only where wgmma is compiled is there anything to launch.
template <typename Math, typename T = typename Math::Value>
__global__ void __launch_bounds__(kWgmmaThreads, PartsOf<Math>::kCount == 1 ? 2 : 1)
    wgmma_similarities(const __grid_constant__ TileGroup<float> all, Matrix<T> row_points,
                       Matrix<T> col_points, const __grid_constant__ TileNeed<float> need) {
#if DML_COMPILES_WGMMA
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Tile = WgmmaProduct<Math>;
    const auto tile_group = all.in_use();
    const int row_tile = int(blockIdx.y), col_tile = int(blockIdx.x);
    const int64_t ti = tile_group.row_tile + row_tile, tj = tile_group.col_tile + col_tile;
    TileLines<Math> lines(Tile::kSharedBytes, PatternAlignedArrays{});
    if (!tile_group.has(ti, tj) || !need.of(tile_group, ti, tj, lines.labels, lines.flags)) return;
    lines.load(tile_group, ti, tj);
    const int slices = tile_group.row_image.across;
    Tile product;
    product.init_barriers();
    if (product.is_producer()) {
        const auto of_tile = [](int tile) { return [=](int slice) { return SlicePlace{tile, slice, 0}; }; };
        product.template produce<Major::kK, Major::kK>(tile_group.row_image, of_tile(row_tile),
                                                       tile_group.col_image, of_tile(col_tile), slices);
        return;
    }
    float sums[kWgmmaRegisters] = {};
    product.template consume<Major::kK, Major::kK>(sums, slices, [](int) { return RowScales{{1.0f, 1.0f}}; });
    ConsumerSync{}();  // the stages have been read, and make room for the similarities
    static_assert(ProductTraits<Math>::kSimBytes <= Tile::kStagesBytes, "room for them");
    put_similarities(WgmmaTile{sums}, tile_group, ti, tj, row_points, col_points, lines,
                     reinterpret_cast<float*>(product.stages()), ConsumerSync{});
#endif
}

}  // namespace dml::cuda
