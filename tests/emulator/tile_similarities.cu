// The similarities of tiles as the engine computes them. Arguments: kind (float, high, half, bfloat16), wgmma (0, 1), rows,
// columns, dimension, stride, elements before the first row, and of the similarity euclidean and normalize (0, 1). Points of
// rows and columns come from stdin; similarities go to stdout.
#include <cstdlib>

#include "cuda/hopper/similarities.cuh"
#include "cuda/pairs/prepare_rows.cuh"
#include "planted_bugs.h"

namespace dml {
namespace {

struct Arguments {
    int64_t wgmma, rows, cols, dim, stride, offset;
    Similarity similarity;
};

template <typename Math>
struct Side {
    using T = typename Math::Value;
    using Layout = cuda::PointsLayout<Math>;
    int64_t count, tiles;
    Array<T> data;
    Array<float> norms, scales;
    Array<int64_t> labels;
    Array<unsigned char> blocks;
    cuda::Matrix<T> points;

    Side(int64_t rows, const Arguments& a)
        : count(rows),
          tiles((rows + Layout::kRows - 1) / Layout::kRows),
          data(read<T>(size_t(a.offset + rows * a.stride))),
          norms(size_t(rows)),
          scales(size_t(tiles * Layout::kRows)),
          labels(size_t(rows)),
          blocks(size_t(tiles * Layout::tile_bytes(a.dim))),
          points{data.data() + a.offset, a.stride, rows, a.dim} {
        const cuda::Rows<T, float> all = {points, labels.data(), norms.data(), nullptr};
        launch(cuda::prepare_rows<T, float>, dim3(unsigned((rows + 7) / 8)), dim3(cuda::kNormThreads), 0,
               nullptr, all, a.similarity, cuda::RowStats<float>{}, false);
        launch(cuda::write_image<Math>, dim3(unsigned(tiles * Layout::kRows / cuda::kImageRows)),
               dim3(cuda::kImageThreads), 0, nullptr, all, int64_t(0), blocks.data(), scales.data());
        wait_for_kernels();
    }
    cuda::Lines<float> lines() const { return {count, labels.data(), norms.data(), nullptr}; }
    cuda::Image image() const {
        return {blocks.data(), cuda::PartsOf<Math>::kScaled ? scales.data() : nullptr,
                int(Layout::across(points.cols))};
    }
};

template <typename Math>
void run(const Arguments& a) {
    const Side<Math> rows(a.rows, a), cols(a.cols, a);
    constexpr int64_t kTile = cuda::kTileSide<float>;
    Array<float> tiles(size_t(rows.tiles * cols.tiles * kTile * kTile));
    cuda::TileGroup<float> group = {};
    group.rows = rows.lines();
    group.cols = cols.lines();
    group.similarity = a.similarity;
    group.row_tiles = int(rows.tiles);
    group.col_tiles = int(cols.tiles);
    group.all_row_tiles = rows.tiles;
    group.all_col_tiles = group.used_col_tiles = cols.tiles;
    group.row_image = rows.image();
    group.col_image = cols.image();
    group.similarities = tiles.data();
    const dim3 grid(unsigned(cols.tiles), unsigned(rows.tiles));
    const cuda::TileNeed<float> all = {};
    if (a.wgmma) {
        use_hopper();
        launch(cuda::wgmma_similarities<Math>, grid, dim3(cuda::kWgmmaThreads), cuda::kWgmmaSharedBytes<Math>,
               nullptr, group, rows.points, cols.points, all);
    } else {
        launch(cuda::tile_similarities<Math>, grid, dim3(cuda::kTileThreads),
               cuda::ProductTraits<Math>::kSharedBytes, nullptr, group, rows.points, cols.points, all);
    }
    wait_for_kernels();
    Array<float> out(size_t(a.rows * a.cols));
    for (int64_t i = 0; i < a.rows; ++i) {
        for (int64_t j = 0; j < a.cols; ++j)
            out[size_t(i * a.cols + j)] =
                tiles[size_t(((i / kTile * cols.tiles + j / kTile) * kTile + i % kTile) * kTile + j % kTile)];
    }
    write(out);
}

}  // namespace
}  // namespace dml

int main(int count, char** arguments) {
    return dml::report([&] {
        using namespace dml::cuda;
        if (count != 10) throw std::runtime_error("arguments: kind, wgmma, five sizes, euclidean, normalize");
        int64_t n[8];
        for (int i = 0; i < 8; ++i) n[i] = std::atoi(arguments[2 + i]);
        const dml::Arguments a = {n[0], n[1], n[2], n[3], n[4], n[5], {n[6] != 0, n[7] != 0}};
        const std::string kind = arguments[1];
        if (kind == "float") return dml::run<ScaledMath<2>>(a);
        if (kind == "high") return dml::run<ScaledMath<1>>(a);
        if (kind == "half") return dml::run<HalfMath<__half>>(a);
        dml::run<HalfMath<__nv_bfloat16>>(a);
    });
}
