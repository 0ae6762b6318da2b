// The CPU engine: which tiles to visit, in which order and how often. The products of tiles are in
// product_kernels_impl.h, the loops over their pairs in tile_kernels_impl.h.
//
// Forward, with mining (rows and columns sorted by label, so positives lie beside the diagonal):
//   1. the tiles that hold positives: each row's smallest positive similarity, hence which negatives
//      are kept;
//   2. every tile: the fold of the kept negatives and their maximum, hence which positives are kept;
//   3. the tiles that hold positives again: the fold of the kept positives.
// Without mining step 2 does both kinds and is the only one, unless the law's positives see the value of the
// negatives' fold: then steps 2 and 3. Tiles leave what they add to the rows' folds apart (TileParts), and a
// fold merges it in the order of the tiles, each block of rows by one task.
//
// Backward visits only the tiles in which something was kept, turns similarities into weights dL/ds_ij, and
// multiplies them by the points: each block of rows and panel of dimensions is one task, which adds its tiles
// in order, by a dense product, or pair by pair where few are left.
//
// So every number is made in one fixed order, whatever the number of threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <memory>
#include <vector>

#include "../ops.h"
#include "plan.h"
#include "points.h"
#include "product_kernels.h"
#include "tasks.h"
#include "tile_kernels.h"
#include "tiles.h"

namespace dml::cpu {

using at::Tensor;

// Memory that may hold similarity tiles from forward to backward, whatever N and M: less where the gradient
// of the columns, which may be many, comes on top.
constexpr int64_t kSquareCacheBytes = int64_t(64) << 20, kCacheBytes = int64_t(32) << 20;

// Memory of the weights of one wave of tiles.
constexpr int64_t kSquareWeightBytes = int64_t(16) << 20, kWeightBytes = int64_t(8) << 20;

// Memory of the columns of a super-tile, where they are packed one super-tile after the other.
constexpr int64_t kWindowBytes = int64_t(8) << 20;

// Tiles of one wave of the forward pass: some 3 MiB of parts.
constexpr int64_t kForwardWave = 256;

// A tile whose share of non-zero weights is below this is multiplied pair by pair: above it the dense
// product, which wastes work on zeros but uses the cache better, is faster.
constexpr double kSparseShare = 0.4;

// Rows whose losses one task finishes and adds up.
constexpr int64_t kRowPiece = 64;

// ---- what forward leaves for backward -------------------------------------------------------------------

// The bytes of `saved`: [stats | plan | kept | tiles], each from a multiple of 64 on.
//   stats  T: six numbers a row, two scales, poisoned     plan   int32 (plan.h)
//   kept   per tile, whether any of its pairs may have a gradient
//   tiles  the similarities of the first `cached` tiles
struct Layout {
    int64_t plan, kept, tiles, cached, bytes;

    Layout(int64_t n, const Tiles& all, int64_t itemsize, bool save_tiles) {
        const auto after = [](int64_t at, int64_t size) { return (at + size + 63) / 64 * 64; };
        const int64_t most = all.square ? kSquareCacheBytes : kCacheBytes;
        cached = save_tiles ? std::min(all.count(), most / (all.area() * itemsize)) : 0;
        plan = after(0, (6 * n + 3) * itemsize);
        kept = after(plan, Plan::numel(n, all.m, all.square) * int64_t(sizeof(int32_t)));
        tiles = after(kept, all.count());
        bytes = tiles + cached * all.area() * itemsize;
    }
};

template <typename T>
struct Stats {
    T *neg_above, *pos_below, *neg_value, *pos_value, *d_neg, *d_pos;  // [N] each
    T* scale;                                                          // [2] 1 / units of each part
    T* poisoned;

    Stats(T* data, int64_t n)
        : neg_above(data),
          pos_below(data + n),
          neg_value(data + 2 * n),
          pos_value(data + 3 * n),
          d_neg(data + 4 * n),
          d_pos(data + 5 * n),
          scale(data + 6 * n),
          poisoned(data + 6 * n + 2) {}
};

// ---- one batch, prepared --------------------------------------------------------------------------------

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

    explicit References(const Call& call)
        : points(first_rows(call.ref_emb, call.ref_count)),
          labels(first_rows(call.ref_labels, call.ref_count)),
          capacity((call.ref_emb ? *call.ref_emb : call.embeddings).size(0)) {
        TORCH_CHECK_VALUE(std::max(call.embeddings.size(0), capacity) < std::numeric_limits<int32_t>::max(),
                          "embeddings: too many rows, ", std::max(call.embeddings.size(0), capacity));
    }
    int64_t count(const Call& call) const { return points ? points->size(0) : call.embeddings.size(0); }
};

// The sorted points on both sides and the tiles between them.
template <typename T>
class Batch {
   public:
    // once: every tile is visited once at most.
    Batch(const Call& call, const References& refs, const Problem& problem, const Layout& layout,
          uint8_t* saved, bool once)
        : square(problem.square),
          n(call.embeddings.size(0)),
          m(refs.count(call)),
          similarity(problem.similarity),
          params(problem.params),
          kernels(tile_kernels<T>(problem.law)),
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
        if (!square && !call.self_ref) return;
        const Tensor self = call.self_ref ? call.self_ref->contiguous() : Tensor();
        own_ = own_columns(plan, n, m, call.self_ref ? self.const_data_ptr<int64_t>() : nullptr);
    }

    const bool square;
    const int64_t n, m;
    const Similarity similarity;
    const double* const params;
    const TileKernels<T>& kernels;
    const ProductKernels<T>& products;
    const Tiles tiles;
    const Plan plan;
    const bool windows;  // points are packed when a super-tile needs them, else all are at first
    PackedPoints<T> rows;
    PackedPoints<T>& cols;
    const Stats<T> stats;
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

    // Calls visit(wave) with the wanted tiles, at most `most` at a time (and at least one super-tile's row),
    // their points packed. Around the waves of one super-tile: enter(it), and leave(it), called for an empty
    // one too, while its points are still packed; where windows are not used there is but one of both, for
    // all.
    template <typename Wanted, typename Visit, typename Enter, typename Leave>
    void for_each_wave(int64_t most, const Wanted& wanted, const Visit& visit, const Enter& enter,
                       const Leave& leave) {
        std::vector<TileAt> wave;
        if (!windows) {
            const Tiles::Super all{0, tiles.row_blocks, 0, tiles.col_blocks};
            enter(all);
            tiles.for_each_super(tiles.col_blocks, [&](const Tiles::Super& super) {
                tiles.gather(super, most, wanted, wave, visit);
            });
            Tiles::flush(wave, visit);
            leave(all, true);
            return;
        }
        const int64_t bytes = tiles.side * cols.stride() * int64_t(sizeof(T));
        tiles.for_each_super(std::max<int64_t>(kWindowBytes / bytes, 1), [&](const Tiles::Super& super) {
            bool some = false;
            const auto ready = [&](const std::vector<TileAt>& wave) {
                if (!some) {
                    rows.show(super.i0 * tiles.side, std::min(super.i1 * tiles.side, n));
                    cols.show(super.j0 * tiles.side, std::min(super.j1 * tiles.side, m));
                    enter(super);
                }
                some = true;
                visit(wave);
            };
            tiles.gather(super, most, wanted, wave, ready);
            Tiles::flush(wave, ready);
            leave(super, some);
        });
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

// ---- forward --------------------------------------------------------------------------------------------

// The rows' folds while tiles pass.
template <typename T>
struct Folds {
    std::vector<T> numbers;  // [7, N]
    T *neg_a, *neg_b, *max_neg, *min_pos, *pos_a, *pos_b, *pos_context;

    Folds(int64_t n, Fold neg, Fold pos) : numbers(7 * n, T(0)) {
        T** const all[] = {&neg_a, &neg_b, &max_neg, &min_pos, &pos_a, &pos_b, &pos_context};
        for (int k = 0; k < 7; ++k) *all[k] = numbers.data() + k * n;
        if (neg == Fold::kLogSumExp) std::fill_n(neg_a, n, -infinity<T>());
        if (pos == Fold::kLogSumExp) std::fill_n(pos_a, n, -infinity<T>());
        std::fill_n(max_neg, n, -infinity<T>());
        std::fill_n(min_pos, n, infinity<T>());
    }

    T neg_value(const TileKernels<T>& of, int64_t i) const { return value(of, of.neg, neg_a[i], neg_b[i]); }
    T pos_value(const TileKernels<T>& of, int64_t i) const { return value(of, of.pos, pos_a[i], pos_b[i]); }

   private:
    static T value(const TileKernels<T>& of, Fold fold, T a, T b) {
        return fold == Fold::kSum ? b : LogSumExp<T>{a, b}.value(of.plus_one);
    }
};

// Whether a row with so many pairs can have a loss.
template <typename T>
bool can_have_loss(const TileKernels<T>& law, bool mining, int64_t positives, int64_t negatives) {
    return mining ? positives > 0 && negatives > 0
                  : (!law.needs_pos || positives > 0) && (!law.needs_neg || negatives > 0);
}

// Which pairs of row i are kept, now that the hardest negative is known. In exact arithmetic both kept sets
// are empty together; rounding must not part them.
template <typename T>
Bounds<T> close_bounds(const TileKernels<T>& law, Folds<T>& folds, int64_t i, T neg_above, T epsilon) {
    const T below = folds.max_neg[i] + epsilon;
    if (folds.max_neg[i] != -infinity<T>() && folds.min_pos[i] < below) return {below, neg_above};
    folds.neg_a[i] = law.neg == Fold::kLogSumExp ? -infinity<T>() : T(0);
    folds.neg_b[i] = T(0);
    folds.max_neg[i] = -infinity<T>();
    return Bounds<T>::none();
}

// What a row's folds make of it.
template <typename T>
struct FinishedRow {
    RowSlopes<T> loss;
    T neg_value, pos_value, units[2];
    bool poisoned;

    // positives, negatives: how many pairs the row has, kept or not.
    FinishedRow(const TileKernels<T>& law, const double* params, bool mining, Reduction reduction,
                const Folds<T>& folds, int64_t i, int64_t positives, int64_t negatives, bool finite) {
        Gathered<T> row;
        row.neg = neg_value = folds.neg_value(law, i);
        row.pos = pos_value = folds.pos_value(law, i);
        if (law.neg == Fold::kSum) row.neg_count = folds.neg_a[i];
        if (law.pos == Fold::kSum) row.pos_count = folds.pos_a[i];
        loss = law.row(params, row, folds.pos_context[i]);
        const bool some = positives > 0 || negatives > 0;
        poisoned = !finite && some && can_have_loss(law, mining, positives, negatives);
        if (poisoned) loss.part[0] = std::numeric_limits<T>::quiet_NaN();
        const bool kept_pos = law.pos == Fold::kSum ? folds.pos_a[i] > T(0) : folds.pos_a[i] > -infinity<T>();
        const bool valid = mining ? kept_pos || folds.max_neg[i] > -infinity<T>() : some;
        for (int k = 0; k < 2; ++k) {
            units[k] = loss.unit[k];
            if (law.unit != Unit::kRow) continue;
            if (reduction == Reduction::kMeanNonzero) units[k] = loss.part[k] != T(0);
            if (reduction == Reduction::kMeanValid && law.parts == 1) units[k] = valid;
        }
    }
};

// What the losses of some rows add up to.
struct Total {
    double part[2] = {0, 0}, units[2] = {0, 0};
    bool poisoned = false;

    void add(const Total& other) {
        for (int k = 0; k < 2; ++k) {
            part[k] += other.part[k];
            units[k] += other.units[k];
        }
        poisoned = poisoned || other.poisoned;
    }
};

template <typename T>
class Forward {
   public:
    Forward(Batch<T>& batch, const Problem& problem)
        : batch_(batch),
          kernels_(batch.kernels),
          mining_(problem.mining),
          mine_self_(!batch.square && problem.mine_self),
          reduction_(problem.reduction),
          count_nonzero_(kernels_.unit == Unit::kPair && reduction_ == Reduction::kMeanNonzero),
          folds_(batch.n, kernels_.neg, kernels_.pos),
          block_active_(batch.tiles.row_blocks, 0),
          known_(batch.tiles.count(), 0) {}

    void accumulate() {
        open_bounds();
        const auto active = [&](const TileAt& at) {
            return block_active_[at.row_block] || (batch_.square && block_active_[at.col_block]);
        };
        const auto with_positives = [&](const TileAt& at) {
            return active(at) && batch_.holds_positives(at);
        };
        if (!mining_.on && !kernels_.context) {
            pass(active, Kinds::kBoth);
            return;
        }
        if (mining_.on) {
            find_hardest_positives(with_positives);
            each_row([&](int64_t i) {
                T& above = batch_.stats.neg_above[i];
                if (above == -infinity<T>()) above = folds_.min_pos[i] - T(mining_.epsilon);
            });
        }
        pass([&](const TileAt& at) { return active(at) && batch_.holds_negatives(at); }, Kinds::kNegatives);
        each_row([&](int64_t i) {
            if (mining_.on)
                set_bounds(i,
                           close_bounds(kernels_, folds_, i, batch_.stats.neg_above[i], T(mining_.epsilon)));
            if (kernels_.context) batch_.stats.neg_value[i] = folds_.neg_value(kernels_, i);
        });
        pass(with_positives, Kinds::kPositives);
    }

    // What accumulate does of one stage, for columns that are one block of several: the rows' folds, bounds
    // and values are those of the blocks before (blocks.cpp).
    void hardest_positives() {
        find_hardest_positives([&](const TileAt& at) { return batch_.holds_positives(at); });
    }
    void add(Kinds kinds) {
        pass(
            [&](const TileAt& at) {
                return kinds == Kinds::kBoth ||
                       (kinds == Kinds::kPositives ? batch_.holds_positives(at) : batch_.holds_negatives(at));
            },
            kinds);
    }
    Folds<T>& folds() { return folds_; }

    // The rows' losses, and what backward needs of them. `each`: [N] in the order of the embeddings, or null.
    Total finish(bool finite, T* each) {
        batch_.clear_unknown(known_);
        const int64_t pieces = (batch_.n + kRowPiece - 1) / kRowPiece;
        std::vector<Total> totals(pieces);
        for_tasks(pieces, batch_.n * 64, [&](int64_t k) {
            const int64_t end = std::min(batch_.n, (k + 1) * kRowPiece);
            for (int64_t i = k * kRowPiece; i < end; ++i) finish_row(i, finite, each, totals[k]);
        });
        Total total;
        for (const Total& piece : totals) total.add(piece);
        return total;
    }

   private:
    template <typename Visit>
    void each_row(const Visit& visit) {
        for_pieces(batch_.n, kRowPiece, batch_.n * 8, [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; ++i) visit(i);
        });
    }

    int64_t mined_positives(int64_t i) const {
        return mine_self_ ? batch_.same_label(i) : batch_.positives(i);
    }

    // Keeps every pair of the rows that can have a loss, and none of the others.
    void open_bounds() {
        for_tasks(batch_.tiles.row_blocks, batch_.n * 8, [&](int64_t block) {
            const int64_t begin = block * batch_.tiles.side,
                          end = std::min(batch_.n, begin + batch_.tiles.side);
            bool some = false;
            for (int64_t i = begin; i < end; ++i) {
                const bool active =
                    can_have_loss(kernels_, mining_.on, mining_.on ? mined_positives(i) : batch_.positives(i),
                                  batch_.negatives(i));
                set_bounds(i, active ? Bounds<T>::all() : Bounds<T>::none());
                some = some || active;
            }
            block_active_[block] = some;
        });
    }
    void set_bounds(int64_t i, const Bounds<T>& bounds) {
        batch_.stats.neg_above[i] = bounds.neg_above;
        batch_.stats.pos_below[i] = bounds.pos_below;
    }

    Tile<T> load(const TileAt& at) {
        const Tile<T> tile = batch_.tile(at, known_[at.index]);
        known_[at.index] = 1;
        return tile;
    }

    // Runs `work` on every wanted tile, which returns whether it left parts; then merge(lines' parts, first
    // row, rows) for each block of rows and each tile that did, in the order of the tiles.
    template <typename Wanted, typename Work, typename Merge>
    void over_tiles(const Wanted& wanted, const Work& work, const Merge& merge) {
        const auto visit = [&](const std::vector<TileAt>& wave) {
            const int64_t count = wave.size();
            const std::unique_ptr<TileParts<T>[]> parts(new TileParts<T>[count]);
            std::vector<uint8_t> some(count, 0);
            for_tasks(count, count * batch_.tile_work(),
                      [&](int64_t k) { some[k] = work(wave[k], parts[k]); });
            const Owners owners(wave, batch_.tiles, true, batch_.square);
            for_tasks(owners.size(), 2 * count * batch_.tiles.side * 16, [&](int64_t k) {
                const int64_t first = owners.block(k) * batch_.tiles.side;
                const int lines = static_cast<int>(std::min<int64_t>(batch_.tiles.side, batch_.n - first));
                for (const auto* share = owners.begin(k); share != owners.end(k); ++share) {
                    if (!some[share->tile]) continue;
                    const TileParts<T>& of = parts[share->tile];
                    merge(share->as_rows ? of.rows : of.cols, first, lines);
                }
            });
        };
        const auto nothing = [](const auto&...) {};
        multiply_ahead(wanted);
        batch_.for_each_wave(kForwardWave, wanted, visit, nothing, nothing);
    }

    // The products of cached tiles before they are looked at, cut finer than tiles where there are fewer of
    // them than threads would share evenly.
    template <typename Wanted>
    void multiply_ahead(const Wanted& wanted) {
        constexpr int64_t kColumns = 32;
        const int64_t few = 10 * thread_count(), strips = batch_.tiles.side / kColumns;
        if (batch_.windows || thread_count() == 1) return;
        std::vector<TileAt> ahead;
        bool many = false;
        batch_.tiles.for_each_super(batch_.tiles.col_blocks, [&](const Tiles::Super& super) {
            if (many) return;
            const auto wanted_here = [&](const TileAt& at) {
                return batch_.is_cached(at) && !known_[at.index] && wanted(at);
            };
            batch_.tiles.gather(super, few, wanted_here, ahead, [&](auto&) { many = true; });
        });
        if (many) return;
        const int64_t count = ahead.size();
        for_tasks(count * strips, count * batch_.tile_work(), [&](int64_t k) {
            const int64_t from = k % strips * kColumns;
            batch_.multiply(ahead[k / strips], from, from + kColumns);
        });
        for (const TileAt& at : ahead) known_[at.index] = 1;
    }

    template <typename Wanted>
    void find_hardest_positives(const Wanted& wanted) {
        over_tiles(
            wanted,
            [&](const TileAt& at, TileParts<T>& parts) {
                Tile<T> tile = load(at);
                if (mine_self_) tile.own = nullptr;
                kernels_.min_positives(tile, parts);
                return true;
            },
            [&](const LineParts<T>& of, int64_t first, int lines) {
                T* least = folds_.min_pos + first;
                for (int i = 0; i < lines; ++i) least[i] = std::min(least[i], of.pos_a[i]);
            });
    }

    template <typename Wanted>
    void pass(const Wanted& wanted, Kinds kinds) {
        const RowStates<T> states = {batch_.stats.neg_above, batch_.stats.pos_below, batch_.stats.neg_value};
        const bool negatives = kinds != Kinds::kPositives, positives = kinds != Kinds::kNegatives;
        const bool to_neg = negatives || (positives && kernels_.pos_in_neg);
        over_tiles(
            wanted,
            [&](const TileAt& at, TileParts<T>& parts) {
                const Found found =
                    kernels_.accumulate(load(at), batch_.params, kinds, count_nonzero_, states, parts);
                if (found.gradient) batch_.kept[at.index] = 1;
                return found.parts;
            },
            [&](const LineParts<T>& of, int64_t r, int lines) {
                if (to_neg)
                    kernels_.merge(kernels_.neg, lines, of.neg_a, of.neg_b, folds_.neg_a + r,
                                   folds_.neg_b + r);
                if (negatives && mining_.on) {
                    T* most = folds_.max_neg + r;
                    for (int i = 0; i < lines; ++i) most[i] = std::max(most[i], of.max_neg[i]);
                }
                if (!positives) return;
                kernels_.merge(kernels_.pos, lines, of.pos_a, of.pos_b, folds_.pos_a + r, folds_.pos_b + r);
                if (!kernels_.context) return;
                for (int i = 0; i < lines; ++i) folds_.pos_context[r + i] += of.pos_context[i];
            });
    }

    void finish_row(int64_t i, bool finite, T* each, Total& total) {
        const Stats<T>& stats = batch_.stats;
        const FinishedRow<T> row(kernels_, batch_.params, mining_.on, reduction_, folds_, i,
                                 batch_.positives(i), batch_.negatives(i), finite);
        stats.neg_value[i] = row.neg_value;
        stats.pos_value[i] = row.pos_value;
        stats.d_neg[i] = row.loss.d_neg;
        stats.d_pos[i] = row.loss.d_pos;
        if (each) each[batch_.plan.row_order[i]] = row.loss.part[0] + row.loss.part[1];
        total.poisoned = total.poisoned || row.poisoned;
        for (int k = 0; k < 2; ++k) {
            total.part[k] += row.loss.part[k];
            total.units[k] += row.units[k];
        }
    }

    Batch<T>& batch_;
    const TileKernels<T>& kernels_;
    const Mining mining_;
    const bool mine_self_;
    const Reduction reduction_;
    const bool count_nonzero_;
    Folds<T> folds_;
    std::vector<uint8_t> block_active_, known_;
};

template <typename T>
ForwardResult forward(const Call& call) {
    const Problem problem = describe(call);
    const References refs(call);
    const int64_t n = call.embeddings.size(0);
    const Layout layout(n, Tiles(n, refs.capacity, problem.square, refs.capacity), sizeof(T),
                        call.save_for_backward);
    const auto options = call.embeddings.options().dtype(c10::CppTypeToScalarType<T>::value);
    Tensor saved = at::empty({layout.bytes}, options.dtype(at::kByte));
    auto* bytes = saved.data_ptr<uint8_t>();
    std::memset(bytes, 0, layout.tiles);

    const Tensor row_labels = call.labels.contiguous();
    const Tensor col_labels = problem.square ? row_labels : refs.labels->contiguous();
    make_plan(row_labels.const_data_ptr<int64_t>(), n, col_labels.const_data_ptr<int64_t>(), refs.count(call),
              problem.square, reinterpret_cast<int32_t*>(bytes + layout.plan));
    const bool once = !problem.mining.on && !tile_kernels<T>(problem.law).context;
    Batch<T> batch(call, refs, problem, layout, bytes, once);

    const bool each = problem.reduction == Reduction::kNone;
    Tensor loss = each             ? at::empty({n}, options)
                  : problem.divide ? at::empty({}, options)
                                   : at::empty({4}, options);
    T* out = loss.data_ptr<T>();
    Forward<T> pass(batch, problem);
    // Where points are packed on the way a number that is not finite is found on the way, and what was
    // folded until then is not used.
    if (batch.rows.finite && batch.cols.finite) pass.accumulate();
    const bool finite = batch.rows.finite && batch.cols.finite;
    const Total total = pass.finish(finite, each ? out : nullptr);

    const Stats<T>& stats = batch.stats;
    *stats.poisoned = total.poisoned;
    double sum = 0;
    for (int k = 0; k < 2; ++k) {
        const bool divided = problem.reduction != Reduction::kSum && !each;
        const double scale = !divided ? 1.0 : total.units[k] > 0 ? 1.0 / total.units[k] : 0.0;
        stats.scale[k] = static_cast<T>(scale);
        sum += total.poisoned ? total.part[k] : total.part[k] * scale;
        if (!each && !problem.divide) {
            out[k] = static_cast<T>(total.part[k]);
            out[2 + k] = static_cast<T>(total.units[k]);
        }
    }
    if (!each && problem.divide) *out = static_cast<T>(sum);
    return {loss, saved};
}

// ---- backward -------------------------------------------------------------------------------------------

// The gradient of one side: summed up for the points that are in the window, then handed on.
template <typename T>
class Gradient {
   public:
    // out: where it goes, undefined where it is not wanted.
    Gradient(const PackedPoints<T>& points, const Tensor& out) : points_(points), out_(out) {}

    bool wanted() const { return out_.defined(); }
    bool is_open() const { return open_; }
    T* row(int64_t i) const { return sum_.data() + (i - first_) * points_.padded_width(); }

    // Begins the sums of the points from first to last, unless they are those under way.
    void open(int64_t first, int64_t last) {
        if (!wanted() || (open_ && first == first_)) return;
        const int64_t width = points_.padded_width();
        sum_.reserve(padded(last - first) * width);
        first_ = first;
        open_ = true;
        for_pieces(last - first, row_piece(width), (last - first) * row_work(width) / 4,
                   [&](int64_t from, int64_t to) { std::fill(row(first + from), row(first + to), T(0)); });
    }

    // Ends them; without a beginning they are 0.
    void close(int64_t first, int64_t last) {
        if (!wanted()) return;
        if (open_) {
            unpack(static_cast<const T*>(row(first)), points_, first, last - first, out_);
        } else {
            clear_rows(points_, first, last - first, out_);
        }
        open_ = false;
    }

   private:
    const PackedPoints<T>& points_;
    const Tensor out_;  // [N, D]
    Numbers<T> sum_;    // [padded(window), padded width]
    int64_t first_ = 0;
    bool open_ = false;
};

template <typename T>
class BackwardPass {
   public:
    BackwardPass(Batch<T>& batch, const RowWeights<T>& rows, const Tensor& grad_emb, const Tensor& grad_ref)
        : batch_(batch),
          weights_(rows),
          width_(batch.rows.padded_width()),
          grad_rows_(batch.rows, grad_emb),
          grad_cols_(batch.cols, grad_ref) {}

    void run() {
        const Tiles& tiles = batch_.tiles;
        const int64_t bytes = batch_.square ? kSquareWeightBytes : kWeightBytes;
        const int64_t slots = std::max<int64_t>(bytes / (tiles.area() * int64_t(sizeof(T))), 1);
        const auto wanted = [&](const TileAt& at) { return batch_.kept[at.index] != 0; };
        const auto visit = [&](const std::vector<TileAt>& wave) {
            const int64_t count = wave.size();
            memory_.reserve(std::min(slots, tiles.count()) * tiles.area());
            nonzeros_.assign(count, 0);
            for_tasks(count, count * batch_.tile_work(), [&](int64_t k) { make_weights(wave[k], k); });
            add_gradients(wave);
        };
        // The sums of a block of rows are complete after all of its super-tiles, which follow each other;
        // those of columns after one super-tile if that holds all rows, else in the end.
        const bool at_once = batch_.windows && tiles.whole_columns();
        if (!at_once) grad_cols_.open(0, batch_.m);
        const auto enter = [&](const Tiles::Super& super) {
            grad_rows_.open(super.i0 * tiles.side, std::min(super.i1 * tiles.side, batch_.n));
            if (at_once) grad_cols_.open(super.j0 * tiles.side, std::min(super.j1 * tiles.side, batch_.m));
        };
        const auto leave = [&](const Tiles::Super& super, bool) {
            if (super.j1 == tiles.col_blocks)
                close(grad_rows_, batch_.rows, super.i0 * tiles.side,
                      std::min(super.i1 * tiles.side, batch_.n));
            if (at_once)
                close(grad_cols_, batch_.cols, super.j0 * tiles.side,
                      std::min(super.j1 * tiles.side, batch_.m));
        };
        batch_.for_each_wave(slots, wanted, visit, enter, leave);
        if (!at_once) close(grad_cols_, batch_.cols, 0, batch_.m);
    }

   private:
    Batch<T>& batch_;
    const RowWeights<T> weights_;
    const int64_t width_;
    Numbers<T> memory_;              // the weights of a wave, tile by tile, dense or as a SparseTile
    std::vector<int64_t> nonzeros_;  // of each tile; kDense where they are not told apart
    Gradient<T> grad_rows_, grad_cols_;
    static constexpr int64_t kDense = -1;

    // A gradient's way back needs its points.
    static void close(Gradient<T>& gradient, PackedPoints<T>& points, int64_t first, int64_t last) {
        if (gradient.wanted() && gradient.is_open()) points.show(first, last);
        gradient.close(first, last);
    }

    T* slot(int64_t k) const { return memory_.data() + k * batch_.tiles.area(); }

    void make_weights(const TileAt& at, int64_t k) {
        Tile<T> tile = batch_.tile(at, true);
        tile.both_sides = batch_.square;  // W + W^T, for the diagonal tiles too
        const int64_t pairs = int64_t(tile.rows) * tile.cols, size = padded(tile.rows) * tile.pitch;
        if (size > pairs) std::fill(slot(k), slot(k) + size, T(0));
        const int64_t count =
            batch_.kernels.weights(tile, batch_.params, batch_.similarity.euclidean, weights_, slot(k));
        const bool sparse =
            count < kSparseShare * pairs &&
            SparseTile<T>::bytes(tile.rows, tile.cols, count) <= batch_.tiles.area() * int64_t(sizeof(T));
        nonzeros_[k] = sparse ? count : kDense;
        if (!sparse || count == 0) return;
        T* dense = Scratch<T>::mine().tile;
        std::memcpy(dense, slot(k), size * sizeof(T));
        batch_.kernels.compress(dense, tile.pitch, tile.rows, tile.cols, count, slot(k));
    }

    // Some lines of a block and some dimensions, which one task adds up.
    struct Piece {
        int64_t owner, line, lines, dim, dims, work;
    };

    // Cuts the blocks where there is more than one thread: into panels of dimensions, then into lines, each
    // block into as many pieces as its share of the work asks for. The longest come first, so that no thread
    // begins one when the others are done. What a piece adds up does not depend on where it ends.
    std::vector<Piece> cut(const Owners& owners) const {
        constexpr int64_t kDims = 64, kLines = 32, kPiecesPerThread = 4;
        if (width_ == 0) return {};  // points without dimensions
        std::vector<int64_t> work(owners.size(), 0);
        int64_t all = 0;
        for (int64_t k = 0; k < owners.size(); ++k) {
            for (const auto* share = owners.begin(k); share != owners.end(k); ++share) {
                const int64_t count = nonzeros_[share->tile];
                work[k] += count == kDense ? batch_.tiles.area() : 2 * count;
            }
            all += work[k];
        }
        const int64_t threads = thread_count();
        std::vector<Piece> pieces;
        for (int64_t k = 0; k < owners.size(); ++k) {
            if (work[k] == 0) continue;
            const int64_t wanted = threads == 1 ? 1 : 1 + work[k] * kPiecesPerThread * threads / all;
            const int64_t panels = std::min(wanted, (width_ + kDims - 1) / kDims);
            const int64_t dims = (width_ / panels + kDims - 1) / kDims * kDims;
            const int64_t strips = std::clamp<int64_t>(wanted / panels, 1, batch_.tiles.side / kLines);
            const int64_t lines = (batch_.tiles.side / strips + kLines - 1) / kLines * kLines;
            const int64_t here = lines_of(owners, k);
            for (int64_t line = 0; line < here; line += lines) {
                for (int64_t dim = 0; dim < width_; dim += dims) {
                    const int64_t high = std::min(lines, here - line), wide = std::min(dims, width_ - dim);
                    pieces.push_back({k, line, high, dim, wide, work[k] / here * high * wide});
                }
            }
        }
        if (threads > 1) {
            std::stable_sort(pieces.begin(), pieces.end(),
                             [](const Piece& a, const Piece& b) { return a.work > b.work; });
        }
        return pieces;
    }

    int64_t lines_of(const Owners& owners, int64_t k) const {
        const int64_t first = owners.block(k) * batch_.tiles.side;
        return std::min<int64_t>(batch_.tiles.side, (owners.is_rows(k) ? batch_.n : batch_.m) - first);
    }

    void add_gradients(const std::vector<TileAt>& wave) {
        const Owners owners(wave, batch_.tiles, grad_rows_.wanted(), batch_.square || grad_cols_.wanted());
        const std::vector<Piece> pieces = cut(owners);
        const int64_t work = int64_t(wave.size()) * batch_.tiles.area() * (width_ / 8 + 1);
        for_tasks(pieces.size(), work, [&](int64_t task) {
            const Piece& piece = pieces[task];
            const int64_t first = owners.block(piece.owner) * batch_.tiles.side + piece.line;
            const Gradient<T>& gradient = owners.is_rows(piece.owner) ? grad_rows_ : grad_cols_;
            T* out = gradient.row(first) + piece.dim;
            for (const auto* share = owners.begin(piece.owner); share != owners.end(piece.owner); ++share)
                add_share(wave[share->tile], *share, piece, out);
        });
    }

    // Adds the weights of a tile times the points on its other side to the lines of a piece.
    void add_share(const TileAt& at, const Owners::Share& share, const Piece& piece, T* out) const {
        const int64_t count = nonzeros_[share.tile];
        if (count == 0) return;
        const Tile<T> tile = batch_.place(at);
        const PackedPoints<T>& points = share.as_rows ? batch_.cols : batch_.rows;
        T* x = points.row(share.as_rows ? tile.col0 : tile.row0) + piece.dim;
        if (count != kDense) {
            const SparseTile<T> sparse(slot(share.tile), tile.rows, tile.cols, count);
            auto lines = share.as_rows ? sparse.by_row : sparse.by_col;
            lines.start += piece.line;
            batch_.kernels.add_product(lines, static_cast<int>(piece.lines), x, points.stride(), piece.dims,
                                       out, width_);
            return;
        }
        const T* w = slot(share.tile) + piece.line * (share.as_rows ? tile.pitch : 1);
        const Strided<T> weights =
            share.as_rows ? Strided<T>{w, tile.pitch, 1} : Strided<T>{w, 1, tile.pitch};
        batch_.products.add(padded(piece.lines), piece.dims, share.as_rows ? tile.cols : tile.rows, weights,
                            x, points.stride(), out, width_);
    }
};

template <typename T>
BackwardResult backward(const Call& call, const Backward& from) {
    const Problem problem = describe(call);
    const References refs(call);
    const int64_t n = call.embeddings.size(0);
    const Tiles all(n, refs.capacity, problem.square, refs.capacity);
    const Layout with_tiles(n, all, sizeof(T), true), without(n, all, sizeof(T), false);
    const Layout& layout = from.saved.numel() == without.bytes ? without : with_tiles;
    check_backward(call, from, layout.bytes);
    auto* saved = from.saved.data_ptr<uint8_t>();
    const bool need_ref = from.need_ref && call.ref_emb.has_value();
    const auto none = [&] { return at::empty({0}, call.embeddings.options()); };
    if (*Stats<T>(reinterpret_cast<T*>(saved), n).poisoned != T(0)) {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        const auto fill = [&](const Tensor& like) { return at::full(like.sizes(), nan, like.options()); };
        return {from.need_emb ? fill(call.embeddings) : none(), need_ref ? fill(*call.ref_emb) : none()};
    }
    Batch<T> batch(call, refs, problem, layout, saved, true);

    // The rows' derivatives, with what comes from above.
    constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;
    const Tensor upstream =
        (from.grad_loss.scalar_type() == kType ? from.grad_loss : from.grad_loss.to(kType)).contiguous();
    const T* g = upstream.const_data_ptr<T>();
    const int last = batch.kernels.parts - 1;
    const bool each = problem.reduction == Reduction::kNone;
    std::vector<T> d(2 * n);
    T *d_neg = d.data(), *d_pos = d_neg + n;
    for_pieces(n, kRowPiece, n * 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const T up_pos = each             ? g[batch.plan.row_order[i]]
                             : problem.divide ? *g * batch.stats.scale[0]
                                              : g[0];
            const T up_neg = each ? up_pos : problem.divide ? *g * batch.stats.scale[last] : g[last];
            d_neg[i] = up_neg * batch.stats.d_neg[i];
            d_pos[i] = up_pos * batch.stats.d_pos[i];
        }
    });
    const RowWeights<T> rows = {batch.stats.neg_above,
                                batch.stats.pos_below,
                                batch.stats.neg_value,
                                batch.stats.pos_value,
                                d_neg,
                                d_pos};
    const auto like = [](const Tensor& points) { return at::empty(points.sizes(), points.options()); };
    const Tensor grad_emb = from.need_emb ? like(call.embeddings) : Tensor();
    const Tensor grad_ref = need_ref ? like(*call.ref_emb) : Tensor();
    if (need_ref) grad_ref.narrow(0, batch.m, grad_ref.size(0) - batch.m).zero_();  // they took no part
    if (batch.tiles.count() == 0) {
        if (from.need_emb) grad_emb.zero_();
        if (need_ref) grad_ref.zero_();
    } else if (from.need_emb || need_ref) {
        BackwardPass<T>(batch, rows, grad_emb, grad_ref).run();
    }
    return {from.need_emb ? grad_emb : none(), need_ref ? grad_ref : none()};
}

}  // namespace dml::cpu
