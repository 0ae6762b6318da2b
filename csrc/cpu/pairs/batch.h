// One batch, prepared: packed points, the plan of its pairs, and its tiles on request.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/kernels/product_kernels.h"
#include "cpu/kernels/tile_kernels.h"
#include "cpu/pairs/layout.h"
#include "cpu/pairs/plan.h"
#include "cpu/pairs/points.h"
#include "cpu/pairs/references.h"
#include "cpu/pairs/scratch.h"
#include "cpu/pairs/tiles.h"
#include "cpu/tasks.h"
#include "torch/ops.h"

namespace dml::cpu {

using at::Tensor;

// Memory of the packed columns of a tile group, where tile groups pack their points in turn (windows).
constexpr int64_t kWindowBytes = int64_t(8) << 20;

// Rows whose losses one task finishes and sums.
constexpr int64_t kRowPiece = 64;

// The sorted points on both sides and the tiles between them.
template <typename T>
class Batch {
   public:
    // once: every tile is visited at most once.
    Batch(const Call& call, const References& refs, const Problem& problem, const Layout<int64_t>& layout,
          uint8_t* saved, bool once)
        : square(problem.square),
          both_sides(problem.square || problem.both_directions),
          n(call.embeddings.size(0)),
          m(refs.count(call)),
          lines(problem.both_directions ? n + m : n),
          similarity(problem.similarity),
          params(problem.params),
          kernels(tile_kernels<T>(problem.formula)),
          products(product_kernels<T>()),
          tiles(n, m, square, refs.capacity),
          plan(reinterpret_cast<int32_t*>(saved + layout.plan), n, m, square),
          windows(!square && once),
          rows(call.embeddings, plan.row_order, similarity),
          cols(square ? rows : ref_points_),
          row_stats(reinterpret_cast<T*>(saved), lines),
          kept(saved + layout.kept),
          cache_(reinterpret_cast<T*>(saved + layout.tiles)),
          cached_(layout.cached),
          ref_points_(square ? call.embeddings : *refs.points, plan.col_order, similarity) {
        if (!windows) {
            rows.show(0, n);
            if (!square) cols.show(0, m);
        }
        if (!square && !call.self_index) return;
        const Tensor self = call.self_index ? call.self_index->contiguous() : Tensor();
        self_cols_ = self_columns(plan, n, m, call.self_index ? self.const_data_ptr<int64_t>() : nullptr);
    }

    const bool square;
    const bool both_sides;  // a tile serves its columns too: of the same points, or with losses of their own
    const int64_t n, m;
    const int64_t lines;  // that have a loss: the rows, then the columns where both directions count
    const Similarity similarity;
    const double* const params;
    const TileKernels<T>& kernels;
    const ProductKernels<T>& products;
    const Tiles tiles;
    const Plan plan;
    const bool windows;  // points are packed when a tile group needs them, else all at the start
    PackedPoints<T> rows;
    PackedPoints<T>& cols;
    const RowStats<T> row_stats;
    uint8_t* const kept;  // [tiles] whether a pair of the tile may have a gradient

    // The place of a tile in the matrix, without its similarities.
    Tile<T> place(const TileAt& at) const {
        const int64_t row0 = at.row_block * tiles.side, col0 = at.col_block * tiles.side;
        const int64_t rows_here = std::min<int64_t>(tiles.side, n - row0);
        const int64_t cols_here = std::min<int64_t>(tiles.side, m - col0);
        return {nullptr,
                padded(cols_here),
                static_cast<int>(rows_here),
                static_cast<int>(cols_here),
                row0,
                col0,
                plan.pos_begin,
                plan.pos_end,
                self_cols_.empty() ? nullptr : self_cols_.data(),
                both_sides && !(square && at.row_block == at.col_block),
                col_line(col0)};
    }

    // The line of a column, and the row of the result that a line is.
    int64_t col_line(int64_t j) const { return square ? j : n + j; }
    int64_t origin(int64_t line) const {
        return line < n ? plan.row_order[line] : n + plan.col_order[line - n];
    }

    // A tile with its similarities: from the cache if `known` says that they are there, else from a product.
    Tile<T> tile(const TileAt& at, bool known) const {
        Tile<T> tile = place(at);
        T* s = is_cached(at) ? cached(at) : Scratch<T>::mine().tile;
        tile.s = s;
        if (!is_cached(at) || !known) multiply(tile, 0, tile.pitch, s);
        return tile;
    }

    bool is_cached(const TileAt& at) const { return at.index < cached_; }

    // Computes the columns [from, to) of a cached tile; both are multiples of 16.
    void multiply(const TileAt& at, int64_t from, int64_t to) const {
        const Tile<T> tile = place(at);
        if (from < tile.pitch) multiply(tile, from, std::min(to, tile.pitch), cached(at));
    }

    // Calls visit(wave) with at most `most` wanted tiles at a time, their points packed. With windows,
    // enter(group) comes before the first wave of a tile group, and leave(group) after its last, while its
    // points are still packed, also for a group without wanted tiles. Without windows, each is called once,
    // for all tiles.
    template <typename Wanted, typename Visit, typename Enter, typename Leave>
    void for_each_wave(int64_t most, const Wanted& wanted, const Visit& visit, const Enter& enter,
                       const Leave& leave) {
        std::vector<TileAt> wave;
        if (!windows) {
            const Tiles::TileGroup all{0, tiles.row_blocks, 0, tiles.col_blocks};
            enter(all);
            tiles.for_each_tile_group(tiles.col_blocks, [&](const Tiles::TileGroup& tile_group) {
                tiles.gather(tile_group, most, wanted, wave, visit);
            });
            Tiles::flush(wave, visit);
            leave(all);
            return;
        }
        const int64_t bytes = tiles.side * cols.stride() * int64_t(sizeof(T));
        tiles.for_each_tile_group(
            std::max<int64_t>(kWindowBytes / bytes, 1), [&](const Tiles::TileGroup& tile_group) {
                bool entered = false;
                const auto ready = [&](const std::vector<TileAt>& wave) {
                    if (!entered) {
                        rows.show(tile_group.i0 * tiles.side, std::min(tile_group.i1 * tiles.side, n));
                        cols.show(tile_group.j0 * tiles.side, std::min(tile_group.j1 * tiles.side, m));
                        enter(tile_group);
                    }
                    entered = true;
                    visit(wave);
                };
                tiles.gather(tile_group, most, wanted, wave, ready);
                Tiles::flush(wave, ready);
                leave(tile_group);
            });
    }

    // Calls run(k) for each tile of a wave. Tiles on the diagonal come first: they hold positives and take
    // longest, and no thread should start one when the others are done.
    template <typename Run>
    void for_tiles(const std::vector<TileAt>& wave, const Run& run) const {
        const int64_t count = wave.size(), work = count * tile_work();
        if (!square || thread_count() == 1) return for_tasks(count, work, run);
        std::vector<int32_t> order;
        order.reserve(count);
        for (const bool diagonal : {true, false}) {
            for (int64_t k = 0; k < count; ++k) {
                if ((wave[k].row_block == wave[k].col_block) == diagonal)
                    order.push_back(static_cast<int32_t>(k));
            }
        }
        for_tasks(count, work, [&](int64_t k) { run(int64_t{order[k]}); });
    }

    // Zeros the cached tiles that were not needed: an op must not return uninitialised memory.
    void clear_unknown(const std::vector<uint8_t>& known) const {
        for_tasks(cached_, cached_ * tiles.area() / 8, [&](int64_t index) {
            T* s = cache_ + index * tiles.area();
            const bool filled = index < tiles.count() && known[index];
            if (!filled) std::fill(s, s + tiles.area(), T(0));
        });
    }

    // Steps of work that one tile takes.
    int64_t tile_work() const { return tiles.area() * (rows.dim / 32 + 2); }

    // The pairs of a line. positives() leaves out the self pair; same_label() counts it, as mining does where
    // mine_self_pair.
    int64_t positives(int64_t i) const { return same_label(i) - (has_self_positive(i) ? 1 : 0); }
    int64_t negatives(int64_t i) const { return (i < n ? m : n) - same_label(i); }
    int64_t same_label(int64_t i) const {
        return i < n ? plan.pos_end[i] - plan.pos_begin[i]
                     : plan.col_pos_end[i - n] - plan.col_pos_begin[i - n];
    }

    bool holds_positives(const TileAt& at) const {
        const Tile<T> tile = place(at);
        const int64_t last = tile.row0 + tile.rows - 1;
        return plan.pos_begin[tile.row0] < tile.col0 + tile.cols && plan.pos_end[last] > tile.col0;
    }
    bool holds_negatives(const TileAt& at) const {
        const Tile<T> tile = place(at);
        const int64_t last = tile.row0 + tile.rows - 1;
        return plan.pos_begin[last] > tile.col0 || plan.pos_end[tile.row0] < tile.col0 + tile.cols;
    }

   private:
    T* cached(const TileAt& at) const { return cache_ + at.index * tiles.area(); }

    // Computes the columns [from, to) of a tile into s, its first element. The last columns of a cached tile
    // come with zeros for the rest of its memory.
    void multiply(const Tile<T>& tile, int64_t from, int64_t to, T* s) const {
        const int64_t first = tile.col0 + from;
        const T *x = rows.row(tile.row0), *y = cols.row(first);
        products.similarities(padded(tile.rows), to - from, rows.dim, x, rows.stride(), y, cols.stride(),
                              s + from, tile.pitch);
        if (similarity.euclidean) {
            kernels.distances(s + from, tile.pitch, tile.rows,
                              static_cast<int>(std::min<int64_t>(to, tile.cols) - from), x, rows.stride(),
                              rows.square(tile.row0), y, cols.stride(), cols.square(first), rows.dim);
        }
        if (to == tile.pitch && s != Scratch<T>::mine().tile)
            std::fill(s + padded(tile.rows) * tile.pitch, s + tiles.area(), T(0));
    }

    bool has_self_positive(int64_t i) const {
        return i < n && !self_cols_.empty() && self_cols_[i] >= plan.pos_begin[i] &&
               self_cols_[i] < plan.pos_end[i];
    }

    T* cache_;
    int64_t cached_;
    PackedPoints<T> ref_points_;  // the columns where rectangular
    std::vector<int32_t>
        self_cols_;  // [N] the sorted column that is the same point as row i, or -1; may be empty
};

}  // namespace dml::cpu
