// One batch, prepared: its points packed, its pairs planned, its tiles as they are asked for.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "cpu/kernels/product_kernels.h"
#include "cpu/kernels/tile_kernels.h"
#include "cpu/pairs/layout.h"
#include "cpu/pairs/plan.h"
#include "cpu/pairs/points.h"
#include "cpu/pairs/tiles.h"
#include "cpu/tasks.h"
#include "torch/ops.h"

namespace dml::cpu {

using at::Tensor;

// Memory of the columns of a tile_group-tile, where they are packed one tile_group-tile after the other.
constexpr int64_t kWindowBytes = int64_t(8) << 20;

// Rows whose losses one task finishes and adds up.
constexpr int64_t kRowPiece = 64;

template <typename T>
struct alignas(64) Scratch {
    T tile[kMostSide * kMostSide];

    // Each thread keeps its own from call to call: for a small batch, touching fresh memory would cost as
    // much as the work.
    static Scratch& mine() {
        static thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
        return *scratch;
    }
};

// The rows of a tensor that take part.
inline OptionalTensor first_rows(const OptionalTensor& x, const OptionalTensor& count) {
    if (!x || !count) return x;
    return x->narrow(0, 0, std::clamp<int64_t>(count->item<int64_t>(), 0, x->size(0)));
}

// How the references of a call take part: the whole space that they have, and those that are there.
struct References {
    OptionalTensor points, labels;
    int64_t capacity;

    explicit References(const PairBatch& batch)
        : points(first_rows(batch.ref_emb, batch.num_valid_refs)),
          labels(first_rows(batch.ref_labels, batch.num_valid_refs)),
          capacity((batch.ref_emb ? *batch.ref_emb : batch.embeddings).size(0)) {
        TORCH_CHECK_VALUE(std::max(batch.embeddings.size(0), capacity) < std::numeric_limits<int32_t>::max(),
                          "embeddings: too many rows, ", std::max(batch.embeddings.size(0), capacity));
    }
    int64_t count(const PairBatch& batch) const {
        return points ? points->size(0) : batch.embeddings.size(0);
    }
};

// The sorted points on both sides and the tiles between them.
template <typename T>
class Batch {
   public:
    // once: every tile is visited once at most.
    Batch(const Call& call, const References& refs, const Problem& problem, const Layout<int64_t>& layout,
          uint8_t* saved, bool once)
        : square(problem.square),
          n(call.embeddings.size(0)),
          m(refs.count(call)),
          similarity(problem.similarity),
          params(problem.params),
          kernels(tile_kernels<T>(problem.formula)),
          products(product_kernels<T>()),
          tiles(n, m, square, refs.capacity),
          plan(reinterpret_cast<int32_t*>(saved + layout.plan), n, square),
          windows(!square && once),
          rows(call.embeddings, plan.row_order, similarity),
          cols(square ? rows : other_),
          stats(reinterpret_cast<T*>(saved), n),
          kept(saved + layout.kept),
          cache_(reinterpret_cast<T*>(saved + layout.tiles)),
          cached_(layout.cached),
          other_(square ? call.embeddings : *refs.points, plan.col_order, similarity) {
        if (!windows) {
            rows.show(0, n);
            if (!square) cols.show(0, m);
        }
        if (!square && !call.self_index) return;
        const Tensor self = call.self_index ? call.self_index->contiguous() : Tensor();
        own_ = own_columns(plan, n, m, call.self_index ? self.const_data_ptr<int64_t>() : nullptr);
    }

    const bool square;
    const int64_t n, m;
    const Similarity similarity;
    const double* const params;
    const TileKernels<T>& kernels;
    const ProductKernels<T>& products;
    const Tiles tiles;
    const Plan plan;
    const bool windows;  // points are packed when a tile_group-tile needs them, else all are at first
    PackedPoints<T> rows;
    PackedPoints<T>& cols;
    const RowStats<T> stats;
    uint8_t* const kept;

    // The tile's place, without its similarities.
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
                own_.empty() ? nullptr : own_.data(),
                square && at.row_block != at.col_block};
    }

    // Similarities from the cache where they are known to be there, else from a product.
    Tile<T> tile(const TileAt& at, bool known) const {
        Tile<T> tile = place(at);
        T* s = is_cached(at) ? cached(at) : Scratch<T>::mine().tile;
        tile.s = s;
        if (!is_cached(at) || !known) multiply(tile, 0, tile.pitch, s);
        return tile;
    }

    bool is_cached(const TileAt& at) const { return at.index < cached_; }

    // Some columns of a cached tile, a multiple of 16 of them.
    void multiply(const TileAt& at, int64_t from, int64_t to) const {
        const Tile<T> tile = place(at);
        if (from < tile.pitch) multiply(tile, from, std::min(to, tile.pitch), cached(at));
    }

    // Calls visit(wave) with the wanted tiles, at most `most` at a time (and at least one tile_group-tile's
    // row), their points packed. Around the waves of one tile_group-tile: enter(it), and leave(it), called
    // for an empty one too, while its points are still packed; where windows are not used there is but one of
    // both, for all.
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
            leave(all, true);
            return;
        }
        const int64_t bytes = tiles.side * cols.stride() * int64_t(sizeof(T));
        tiles.for_each_tile_group(
            std::max<int64_t>(kWindowBytes / bytes, 1), [&](const Tiles::TileGroup& tile_group) {
                bool some = false;
                const auto ready = [&](const std::vector<TileAt>& wave) {
                    if (!some) {
                        rows.show(tile_group.i0 * tiles.side, std::min(tile_group.i1 * tiles.side, n));
                        cols.show(tile_group.j0 * tiles.side, std::min(tile_group.j1 * tiles.side, m));
                        enter(tile_group);
                    }
                    some = true;
                    visit(wave);
                };
                tiles.gather(tile_group, most, wanted, wave, ready);
                Tiles::flush(wave, ready);
                leave(tile_group, some);
            });
    }

    // Calls run(k) for each tile of a wave, those on the diagonal first: they hold positives and take
    // longest, and no thread should begin one when the others are done.
    template <typename Run>
    void for_tiles(const std::vector<TileAt>& wave, const Run& run) const {
        const int64_t count = wave.size(), work = count * tile_work();
        if (!square || thread_count() == 1) return for_tasks(count, work, run);
        std::vector<int32_t> turns;
        turns.reserve(count);
        for (const bool diagonal : {true, false}) {
            for (int64_t k = 0; k < count; ++k) {
                if ((wave[k].row_block == wave[k].col_block) == diagonal)
                    turns.push_back(static_cast<int32_t>(k));
            }
        }
        for_tasks(count, work, [&](int64_t turn) { run(int64_t{turns[turn]}); });
    }

    // Gives the cached tiles that were not needed a value: what an op returns must not be left to chance.
    void clear_unknown(const std::vector<uint8_t>& known) const {
        for_tasks(cached_, cached_ * tiles.area() / 8, [&](int64_t index) {
            T* s = cache_ + index * tiles.area();
            const bool filled = index < tiles.count() && known[index];
            if (!filled) std::fill(s, s + tiles.area(), T(0));
        });
    }

    // Steps of work that one tile takes.
    int64_t tile_work() const { return tiles.area() * (rows.dim / 32 + 2); }

    // The pairs of row i that may count, and that mining compares: in a square matrix the self pair is none,
    // where the columns are other points that hold row i's own it does not count, but may be mined with.
    int64_t positives(int64_t i) const { return same_label(i) - (has_own_positive(i) ? 1 : 0); }
    int64_t negatives(int64_t i) const { return m - same_label(i); }
    int64_t same_label(int64_t i) const { return plan.pos_end[i] - plan.pos_begin[i]; }

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

    // s: of the whole tile, whose columns [from, to) are made. A cached tile's end is cleared with its last.
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

    bool has_own_positive(int64_t i) const {
        return !own_.empty() && own_[i] >= plan.pos_begin[i] && own_[i] < plan.pos_end[i];
    }

    T* cache_;
    int64_t cached_;
    PackedPoints<T> other_;  // the columns where they are not the rows
    std::vector<int32_t> own_;
};

}  // namespace dml::cpu
