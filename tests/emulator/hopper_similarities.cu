// Images and norms of two matrices, and the tiles of all products, as csrc/cuda/hopper/ makes them. Arguments: type
// (half, bfloat16), rows, columns (rows of the second matrix), dimension, stride, and elements before the first row. The
// matrices come from stdin; norms of rows and columns, then tiles, go to stdout.
#include <cstdlib>

#include "cuda/hopper/product.cuh"
#include "planted_bugs.h"

namespace dml {
namespace {

template <typename T>
struct Prepared {
    Array<T> image;
    Array<float> norms;

    Prepared(int64_t rows, int64_t dim, int64_t stride, int64_t offset)
        : image(size_t(cuda::image_bytes(rows, dim, 1)) / sizeof(T)), norms(size_t(rows)) {
        const auto points = read<T>(size_t(offset + rows * stride));
        launch(cuda::prepare<T>, dim3(unsigned(cuda::blocks_down(rows) * kBlockRows / cuda::kPrepareRows)),
               dim3(cuda::kPrepareThreads), 0, nullptr,
               cuda::Matrix<T>{points.data() + offset, stride, rows, dim}, Similarity{false, true},
               norms.data(), image.data());
        wait_for_kernels();
    }
};

template <typename T>
void run(const int (&n)[5]) {
    const Prepared<T> rows(n[0], n[2], n[3], n[4]), columns(n[1], n[2], n[3], n[4]);
    const int across = int(cuda::blocks_across(n[2]));
    const dim3 grid(unsigned(cuda::blocks_down(n[1])), unsigned(cuda::blocks_down(n[0])));
    Array<float> tiles(size_t(grid.x) * grid.y * cuda::kTileSide * cuda::kTileSide);
    launch(cuda::products<T, 1>, grid, dim3(cuda::kTileThreads),
           cuda::TileProduct<T, Major::kK, Major::kK, 1>::kSharedBytes, nullptr,
           cuda::Image<T>{rows.image.data(), across, 1}, cuda::Image<T>{columns.image.data(), across, 1},
           tiles.data(), across);
    write(rows.norms);
    write(columns.norms);
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
        std::string(arguments[1]) == "half" ? dml::run<__half>(n) : dml::run<__nv_bfloat16>(n);
    });
}
