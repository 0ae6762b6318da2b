// Images of two matrices, and the tiles of all products, as csrc/cuda/ makes them. Arguments: type (half, bfloat16, or
// float, in two parts), rows, columns (rows of the second matrix), dimension, stride, and elements before the first row. The
// matrices come from stdin; for float the scales of rows and columns, then tiles, go to stdout.
#include <cstdlib>

#include "cuda/hopper/product.cuh"
#include "cuda/pairs/write_image.cuh"
#include "planted_bugs.h"

namespace dml {
namespace {

template <typename Math>
struct Points {
    using T = typename Math::Value;
    using Layout = cuda::PointsLayout<Math>;
    Array<unsigned char> blocks;
    Array<float> scales;
    cuda::Image image;

    static int64_t tiles(int64_t rows) { return (rows + cuda::kProductTile - 1) / cuda::kProductTile; }
    Points(int64_t rows, int64_t dim, int64_t stride, int64_t offset)
        : blocks(size_t(tiles(rows) * Layout::tile_bytes(dim))),
          scales(size_t(tiles(rows) * cuda::kProductTile)),
          image{blocks.data(), scales.data(), int(Layout::across(dim))} {
        const auto points = read<T>(size_t(offset + rows * stride));
        const cuda::Rows<T, float> all = {
            {points.data() + offset, stride, rows, dim}, nullptr, nullptr, nullptr};
        launch(cuda::write_image<Math>, dim3(unsigned(tiles(rows) * cuda::kProductTile / cuda::kImageRows)),
               dim3(cuda::kImageThreads), 0, nullptr, all, int64_t(0), blocks.data(), scales.data());
        wait_for_kernels();
    }
};

template <typename Math>
void run(const int (&n)[5]) {
    using Element = typename Points<Math>::Layout::Element;
    constexpr int kParts = Points<Math>::Layout::kParts;
    const Points<Math> rows(n[0], n[2], n[3], n[4]), columns(n[1], n[2], n[3], n[4]);
    const dim3 grid(unsigned(Points<Math>::tiles(n[1])), unsigned(Points<Math>::tiles(n[0])));
    Array<float> tiles(size_t(grid.x) * grid.y * cuda::kProductTile * cuda::kProductTile);
    launch(cuda::products<Element, kParts>, grid, dim3(cuda::kWgmmaThreads),
           cuda::TileProduct<Element, Major::kK, Major::kK, kParts>::kSharedBytes, nullptr, rows.image,
           columns.image, tiles.data(), rows.image.across);
    if (kParts == 2) {
        write(rows.scales);
        write(columns.scales);
    }
    write(tiles);
}

}  // namespace
}  // namespace dml

int main(int count, char** arguments) {
    return dml::report([&] {
        dml::use_hopper();
        if (count != 7) throw std::runtime_error("arguments: type, rows, columns, dimension, stride, offset");
        int n[5];
        for (int i = 0; i < 5; ++i) n[i] = std::atoi(arguments[2 + i]);
        const std::string type = arguments[1];
        if (type == "float") return dml::run<dml::cuda::ScaledMath<2>>(n);
        type == "half" ? dml::run<dml::cuda::HalfMath<__half>>(n)
                       : dml::run<dml::cuda::HalfMath<__nv_bfloat16>>(n);
    });
}
