// The similarities of tiles as csrc/cuda/pairs/ computes them. Arguments: parts (1, 2), rows, columns, dimension, and of the
// similarity euclidean and normalize (0, 1). Rows and columns come from stdin, both contiguous; similarities go to stdout.
#include <cstdlib>

#include "cuda/pairs/prepare_rows.cuh"
#include "cuda/pairs/tile_similarities.cuh"
#include "planted_bugs.h"

namespace dml {
namespace {

template <typename Math>
struct Side {
    using Layout = cuda::PointsLayout<Math>;
    int64_t tiles;
    Array<float> points, norms, scales;
    Array<int64_t> labels;
    Array<unsigned char> blocks;

    Side(int64_t count, int64_t dim, Similarity similarity)
        : tiles((count + Layout::kRows - 1) / Layout::kRows),
          points(read<float>(size_t(count * dim))),
          norms(size_t(count)),
          scales(size_t(tiles * Layout::kRows)),
          labels(size_t(count)),
          blocks(size_t(tiles * Layout::tile_bytes(dim))) {
        const cuda::Rows<float, float> all = rows(count, dim);
        launch(cuda::prepare_rows<float, float>, dim3(unsigned((count + 7) / 8)), dim3(cuda::kNormThreads), 0,
               nullptr, all, similarity, cuda::RowStats<float>{}, false);
        launch(cuda::write_image<Math>, dim3(unsigned(tiles * Layout::kRows / cuda::kImageRows)),
               dim3(cuda::kImageThreads), 0, nullptr, all, int64_t(0), blocks.data(), scales.data());
        wait_for_kernels();
        for (int64_t i = 0; i < count; ++i) labels.data()[i] = i;
    }
    cuda::Rows<float, float> rows(int64_t count, int64_t dim) {
        return {{points.data(), dim, count, dim}, labels.data(), norms.data(), nullptr};
    }
    cuda::Image image(int64_t dim) const { return {blocks.data(), scales.data(), int(Layout::across(dim))}; }
};

template <typename Math>
void run(int64_t n, int64_t m, int64_t dim, Similarity similarity) {
    Side<Math> rows(n, dim, similarity), cols(m, dim, similarity);
    const cuda::Rows<float, float> of_rows = rows.rows(n, dim), of_cols = cols.rows(m, dim);
    constexpr int64_t kTile = cuda::kTileSide<float>;
    Array<float> tiles(size_t(rows.tiles * cols.tiles * kTile * kTile));
    cuda::TileGroup<float> group = {};
    group.rows = {n, of_rows.labels, of_rows.norms, nullptr};
    group.cols = {m, of_cols.labels, of_cols.norms, nullptr};
    group.similarity = similarity;
    group.row_tiles = int(rows.tiles);
    group.col_tiles = int(cols.tiles);
    group.all_row_tiles = rows.tiles;
    group.all_col_tiles = group.used_col_tiles = cols.tiles;
    group.row_image = rows.image(dim);
    group.col_image = cols.image(dim);
    group.similarities = tiles.data();
    launch(cuda::tile_similarities<Math>, dim3(unsigned(cols.tiles), unsigned(rows.tiles)),
           dim3(cuda::kTileThreads), cuda::ProductTraits<Math>::kSharedBytes, nullptr, group, of_rows.points,
           of_cols.points, cuda::TileNeed<float>{});
    wait_for_kernels();
    Array<float> out(size_t(n * m));
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j)
            out[size_t(i * m + j)] =
                tiles[size_t(((i / kTile * cols.tiles + j / kTile) * kTile + i % kTile) * kTile + j % kTile)];
    }
    write(out);
}

}  // namespace
}  // namespace dml

int main(int count, char** arguments) {
    return dml::report([&] {
        if (count != 7)
            throw std::runtime_error("arguments: parts, rows, columns, dimension, euclidean, normalize");
        int n[6];
        for (int i = 0; i < 6; ++i) n[i] = std::atoi(arguments[1 + i]);
        const dml::Similarity similarity = {n[4] != 0, n[5] != 0};
        if (n[0] == 2) return dml::run<dml::cuda::ScaledMath<2>>(n[1], n[2], n[3], similarity);
        dml::run<dml::cuda::ScaledMath<1>>(n[1], n[2], n[3], similarity);
    });
}
