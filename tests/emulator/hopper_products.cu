// Products of images by csrc/cuda/hopper/tile_product.cuh, in all layouts that the engine needs. Arguments: type
// (half, bfloat16), layout, parts (1, 2), tiles down, tiles across, slices along k, and of both images the blocks down
// and across. The images come from stdin; C, in whole tiles of floats, goes to stdout.
#include <cstdlib>

#include "cuda/hopper/tile_product.cuh"
#include "planted_bugs.h"

namespace dml {
namespace {

using cuda::Image;

template <typename T, Major kA, Major kB, int kParts>
__global__ void __launch_bounds__(cuda::kWgmmaThreads, kParts == 1 ? 2 : 1)
    multiply(Image a, Image b, float* c, int slices) {
    cuda::TileProduct<T, kA, kB, kParts> product;
    product.init_barriers();
    if (product.is_producer()) {
        product.produce(a, b, int(blockIdx.y), int(blockIdx.x), slices);
        return;
    }
    float sums[kWgmmaRegisters];
    product.consume(sums, slices);
    const int warpgroup = int(threadIdx.x) / kWarpgroupSize, thread = int(threadIdx.x) % kWarpgroupSize;
    const int row0 = int(blockIdx.y) * cuda::kProductTile + warpgroup * kWgmmaM,
              column0 = int(blockIdx.x) * cuda::kProductTile, columns = int(gridDim.x) * cuda::kProductTile;
#pragma unroll
    for (int i = 0; i < kWgmmaRegisters; ++i)
        c[(row0 + fragment_row(thread, i)) * columns + column0 + fragment_column(thread, i)] = sums[i];
}

struct Sizes {
    int parts, down, across, slices, a_down, a_across, b_down, b_across;
};

template <typename T, Major kA, Major kB, int kParts>
void run(const Sizes& s) {
    const auto image = [&](const Array<unsigned char>& bytes, int blocks_across) {
        return Image{bytes.data(), nullptr, blocks_across};
    };
    const size_t block = cuda::ImageLayout<T, cuda::kProductTile, kParts>::kBlockBytes;
    const auto a = read<unsigned char>(size_t(s.a_down) * size_t(s.a_across) * block);
    const auto b = read<unsigned char>(size_t(s.b_down) * size_t(s.b_across) * block);
    Array<float> c(size_t(s.down) * size_t(s.across) * cuda::kProductTile * cuda::kProductTile);
    launch(multiply<T, kA, kB, kParts>, dim3(unsigned(s.across), unsigned(s.down)), dim3(cuda::kWgmmaThreads),
           cuda::TileProduct<T, kA, kB, kParts>::kSharedBytes, nullptr, image(a, s.a_across),
           image(b, s.b_across), c.data(), s.slices);
    write(c);
}

template <typename T, int kParts>
void run_layout(const std::string& layout, const Sizes& s) {
    if (layout == "product") return run<T, Major::kK, Major::kK, kParts>(s);
    if (layout == "gradient") return run<T, Major::kK, Major::kMn, kParts>(s);
    if (layout == "transposed") return run<T, Major::kMn, Major::kMn, kParts>(s);
    throw std::runtime_error("no such layout");
}

}  // namespace
}  // namespace dml

int main(int count, char** arguments) {
    return dml::report([&] {
        dml::use_hopper();
        if (count != 11) throw std::runtime_error("arguments: type, layout, parts, and seven sizes");
        const std::string type = arguments[1], layout = arguments[2];
        int n[8];
        for (int i = 0; i < 8; ++i) n[i] = std::atoi(arguments[3 + i]);
        const dml::Sizes sizes = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]};
        if (type == "bfloat16") return dml::run_layout<__nv_bfloat16, 1>(layout, sizes);
        if (sizes.parts == 2) return dml::run_layout<__half, 2>(layout, sizes);
        dml::run_layout<__half, 1>(layout, sizes);
    });
}
