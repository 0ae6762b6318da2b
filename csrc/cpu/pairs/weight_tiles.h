// The weights dL/ds of one wave of tiles, dense or sparse, and their products with points.
#pragma once

#include <array>
#include <cstring>
#include <vector>

#include "cpu/pairs/batch.h"

namespace dml::cpu {

// A tile with a smaller share of non-zero weights is multiplied pair by pair. Above it the dense product is
// faster: it multiplies zeros, but uses the cache better.
constexpr double kSparseShare = 0.4;

template <typename T>
class WeightTiles {
   public:
    // learns: also sums what the parameters do to the terms.
    WeightTiles(const Batch<T>& batch, const RowWeights<T>& rows, bool learns)
        : batch_(batch), rows_(rows), learns_(learns) {}

    // Memory for a wave of `count` tiles; no wave has more than `most`.
    void start_wave(int64_t count, int64_t most) {
        memory_.reserve(most * batch_.tiles.area());
        nonzeros_.assign(count, 0);
        if (learns_) by_params_.assign(count, {});
    }

    // Computes the weights of tile k of the wave.
    void make(const TileAt& at, int64_t k) {
        Tile<T> tile = batch_.tile(at, true);
        tile.both_sides = batch_.both_sides;  // W + W^T, for the diagonal tiles of a square too
        const int64_t pairs = int64_t(tile.rows) * tile.cols;
        double* by_params = learns_ ? by_params_[k].data() : nullptr;
        const int64_t count = batch_.kernels.weights(tile, batch_.params, batch_.similarity.euclidean, rows_,
                                                     slot(k), by_params);
        // A tile on the diagonal has each pair twice, once from either side.
        if (learns_ && batch_.square && at.row_block == at.col_block) {
            for (double& sum : by_params_[k]) sum *= 0.5;
        }
        const bool sparse =
            count < kSparseShare * pairs &&
            SparseTile<T>::bytes(tile.rows, tile.cols, count) <= batch_.tiles.area() * int64_t(sizeof(T));
        nonzeros_[k] = sparse ? count : kDense;
        if (!sparse || count == 0) return;
        T* dense = Scratch<T>::mine().tile;
        std::memcpy(dense, slot(k), tile.rows * tile.pitch * sizeof(T));
        batch_.kernels.compress(dense, tile.pitch, tile.rows, tile.cols, count, slot(k));
    }

    // Adds the sums for the parameters over the wave.
    void add_by_params(double* total) const {
        for (const auto& tile : by_params_) {
            for (int k = 0; k < kMaxParams; ++k) total[k] += tile[k];
        }
    }

    // The work of a product with tile k, in dense weights.
    int64_t work(int64_t k) const { return nonzeros_[k] == kDense ? batch_.tiles.area() : 2 * nonzeros_[k]; }

    // Adds the weights of tile k times the points on its other side to `out`: lines [line, line + lines) of
    // its rows (as_rows) or columns, dimensions [dim, dim + dims). Up to 15 lines after the last are
    // overwritten.
    void add_product(const TileAt& at, int64_t k, bool as_rows, int64_t line, int64_t lines, int64_t dim,
                     int64_t dims, T* out, int64_t out_stride) const {
        const int64_t count = nonzeros_[k];
        if (count == 0) return;
        const Tile<T> tile = batch_.place(at);
        const PackedPoints<T>& points = as_rows ? batch_.cols : batch_.rows;
        T* x = points.row(as_rows ? tile.col0 : tile.row0) + dim;
        if (count != kDense) {
            const SparseTile<T> sparse(slot(k), tile.rows, tile.cols, count);
            auto nonzeros = as_rows ? sparse.by_row : sparse.by_col;
            nonzeros.start += line;
            batch_.kernels.add_product(nonzeros, static_cast<int>(lines), x, points.stride(), dims, out,
                                       out_stride);
            return;
        }
        // A dense tile's padding is uninitialised; it only reaches those lines after the last.
        const T* w = slot(k) + line * (as_rows ? tile.pitch : 1);
        const Strided<T> weights = as_rows ? Strided<T>{w, tile.pitch, 1} : Strided<T>{w, 1, tile.pitch};
        batch_.products.add(padded(lines), dims, as_rows ? tile.cols : tile.rows, weights, x, points.stride(),
                            out, out_stride);
    }

   private:
    static constexpr int64_t kDense = -1;

    T* slot(int64_t k) const { return memory_.data() + k * batch_.tiles.area(); }

    const Batch<T>& batch_;
    const RowWeights<T> rows_;
    const bool learns_;
    std::vector<std::array<double, kMaxParams>> by_params_;  // [wave]
    Numbers<T> memory_;              // [wave, area]: each tile dense, or as a SparseTile
    std::vector<int64_t> nonzeros_;  // [wave] of a sparse tile, else kDense
};

}  // namespace dml::cpu
