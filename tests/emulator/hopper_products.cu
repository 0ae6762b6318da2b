// Products of images by csrc/cuda/hopper/tile_product.cuh, in all layouts that the engine needs. Arguments: type
// (half, bfloat16), layout, parts (1, 2), whether slices and rows have scales (0, 1), tiles down, tiles across, slices
// along k, and of both images the blocks down and across. The images come from stdin; C, in whole tiles of floats, goes to stdout.
#include <cstdlib>

#include "cuda/hopper/tile_product.cuh"
#include "planted_bugs.h"

namespace dml {
namespace {

using cuda::Image;

template <typename T, int kParts, bool kScaled>
using Tile = cuda::TileProduct<T, kParts, kScaled || kParts == 2>;

template <typename T, Major kA, Major kB, int kParts, bool kScaled>
__global__ void __launch_bounds__(cuda::kWgmmaThreads, kScaled || kParts == 2 ? 1 : 2)
    multiply(Image a, Image b, float* c, int slices) {
    Tile<T, kParts, kScaled> product;
    product.init_barriers();
    if (product.is_producer()) {
        const auto along = [](Major major, unsigned tile) {
            return [=](int slice) {
                const int other = int(tile);
                return major == Major::kK ? cuda::SlicePlace{other, slice, 0}
                                          : cuda::SlicePlace{slice / 2, 2 * other, slice % 2};
            };
        };
        product.template produce<kA, kB>(a, along(kA, blockIdx.y), b, along(kB, blockIdx.x), slices);
        return;
    }
    float sums[kWgmmaRegisters] = {};
    product.template consume<kA, kB>(sums, slices, [&](int slice) {
        const auto scale = [&](int row) { return kScaled ? float(1 << (slice % 3 + row % 5)) : 1.0f; };
        return cuda::RowScales{{scale(cuda::WgmmaTile::row(0)), scale(cuda::WgmmaTile::row(2))}};
    });
    const int row0 = int(blockIdx.y) * cuda::kProductTile, column0 = int(blockIdx.x) * cuda::kProductTile,
              columns = int(gridDim.x) * cuda::kProductTile;
    cuda::WgmmaTile{sums}.for_each_run([&](int row, int column, const float (&run)[2]) {
        for (int i = 0; i < 2; ++i) c[(row0 + row) * columns + column0 + column + i] = run[i];
    });
}

struct Sizes {
    int parts, scaled, down, across, slices, a_down, a_across, b_down, b_across;
};

template <typename T, Major kA, Major kB, int kParts, bool kScaled>
void run(const Sizes& s) {
    const auto image = [&](const Array<unsigned char>& bytes, int blocks_across) {
        return Image{bytes.data(), nullptr, blocks_across};
    };
    const size_t block = cuda::ImageLayout<T, cuda::kProductTile, kParts>::kBlockBytes;
    const auto a = read<unsigned char>(size_t(s.a_down) * size_t(s.a_across) * block);
    const auto b = read<unsigned char>(size_t(s.b_down) * size_t(s.b_across) * block);
    Array<float> c(size_t(s.down) * size_t(s.across) * cuda::kProductTile * cuda::kProductTile);
    launch(multiply<T, kA, kB, kParts, kScaled>, dim3(unsigned(s.across), unsigned(s.down)),
           dim3(cuda::kWgmmaThreads), Tile<T, kParts, kScaled>::kSharedBytes, nullptr, image(a, s.a_across),
           image(b, s.b_across), c.data(), s.slices);
    write(c);
}

template <typename T, int kParts, bool kScaled>
void run_layout(const std::string& layout, const Sizes& s) {
    if (layout == "product") return run<T, Major::kK, Major::kK, kParts, kScaled>(s);
    if (layout == "gradient") return run<T, Major::kK, Major::kMn, kParts, kScaled>(s);
    if (layout == "transposed") return run<T, Major::kMn, Major::kMn, kParts, kScaled>(s);
    throw std::runtime_error("no such layout");
}

}  // namespace
}  // namespace dml

int main(int count, char** arguments) {
    return dml::report([&] {
        dml::use_hopper();
        if (count != 12) throw std::runtime_error("arguments: type, layout, parts, scaled, and seven sizes");
        const std::string type = arguments[1], layout = arguments[2];
        int n[9];
        for (int i = 0; i < 9; ++i) n[i] = std::atoi(arguments[3 + i]);
        const dml::Sizes sizes = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8]};
        if (type == "bfloat16") return dml::run_layout<__nv_bfloat16, 1, false>(layout, sizes);
        if (sizes.parts == 2 && sizes.scaled) return dml::run_layout<__half, 2, true>(layout, sizes);
        if (sizes.parts == 2) return dml::run_layout<__half, 2, false>(layout, sizes);
        if (sizes.scaled) return dml::run_layout<__half, 1, true>(layout, sizes);
        dml::run_layout<__half, 1, false>(layout, sizes);
    });
}
