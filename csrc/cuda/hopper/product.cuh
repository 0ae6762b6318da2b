// Products of all rows with all columns, from their images, without any loss in it.
#pragma once

#include "cuda/hopper/tile_product.cuh"

namespace dml::cuda {

// Where in its tile's 128 x 128 floats register i of a consumer thread is stored: threads side by side, four registers
// each, so that whatever reads the tile again loads 16 bytes a thread, in one place of memory a warp.
DML_DEVICE int fragment_place(int thread, int i) { return (i / 4 * kConsumers + thread) * 4 + i % 4; }

// Tile (blockIdx.y, blockIdx.x) of the products, stored behind one another, row by row of tiles.
template <typename T, int kParts>
__global__ void __launch_bounds__(kWgmmaThreads, kParts == 1 ? 2 : 1)
    products(Image rows, Image columns, float* tiles, int slices) {
    TileProduct<T, Major::kK, Major::kK, kParts> product;
    product.init_barriers();
    if (product.is_producer()) {
        product.produce(rows, columns, int(blockIdx.y), int(blockIdx.x), slices);
        return;
    }
    float sums[kWgmmaRegisters];
    product.consume(sums, slices);
    float* const tile = tiles + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * kProductTile * kProductTile;
#pragma unroll
    for (int i = 0; i < kWgmmaRegisters; i += 4) {
        *reinterpret_cast<float4*>(tile + fragment_place(int(threadIdx.x), i)) =
            make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
    }
}

}  // namespace dml::cuda
