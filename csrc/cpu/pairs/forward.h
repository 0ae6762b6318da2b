// The forward pass: which tiles, in which order and how often, and the accumulators of what they leave.
//
// With mining (rows and columns sorted by label, so positives lie beside the diagonal):
//   1. the tiles that hold positives: each row's smallest positive similarity, hence which negatives
//      are kept;
//   2. every tile: the accumulator of the kept negatives and their maximum, hence which positives are kept;
//   3. the tiles that hold positives again: the accumulator of the kept positives.
// Without mining step 2 does both kinds and is the only one, unless the formula's positives see the value of
// the negatives' accumulator: then steps 2 and 3. Tiles leave what they add to the rows' accumulators apart
// (TileParts), and it is merged in the order of the tiles, each block of rows by one task.
#pragma once

#include <ATen/ops/empty.h>

#include <cstring>
#include <memory>
#include <vector>

#include "cpu/pairs/batch.h"

namespace dml::cpu {

// Tiles of one wave of the forward pass: some 3 MiB of parts.
constexpr int64_t kForwardWave = 256;

// The rows' accumulators while tiles pass.
template <typename T>
struct RowAccumulators {
    std::vector<T> numbers;  // [7, N]
    T *neg_a, *neg_b, *max_neg, *min_pos, *pos_a, *pos_b, *pos_context;

    RowAccumulators(int64_t n, Accumulator neg, Accumulator pos) : numbers(7 * n, T(0)) {
        T** const all[] = {&neg_a, &neg_b, &max_neg, &min_pos, &pos_a, &pos_b, &pos_context};
        for (int k = 0; k < 7; ++k) *all[k] = numbers.data() + k * n;
        if (neg == Accumulator::kLogSumExp) std::fill_n(neg_a, n, -infinity<T>());
        if (pos == Accumulator::kLogSumExp) std::fill_n(pos_a, n, -infinity<T>());
        std::fill_n(max_neg, n, -infinity<T>());
        std::fill_n(min_pos, n, infinity<T>());
    }

    T neg_value(const TileKernels<T>& of, int64_t i) const { return value(of, of.neg, neg_a[i], neg_b[i]); }
    T pos_value(const TileKernels<T>& of, int64_t i) const { return value(of, of.pos, pos_a[i], pos_b[i]); }

   private:
    static T value(const TileKernels<T>& of, Accumulator accumulator, T a, T b) {
        return accumulator == Accumulator::kSum ? b : LogSumExp<T>{a, b}.value(of.plus_one);
    }
};

// Whether a row with so many pairs can have a loss.
template <typename T>
bool can_have_loss(const TileKernels<T>& formula, bool mining, int64_t positives, int64_t negatives) {
    return mining ? positives > 0 && negatives > 0
                  : (!formula.needs_pos || positives > 0) && (!formula.needs_neg || negatives > 0);
}

// Which pairs of row i are kept, now that the hardest negative is known. In exact arithmetic both kept sets
// are empty together; rounding must not part them.
template <typename T>
Bounds<T> close_bounds(const TileKernels<T>& formula, RowAccumulators<T>& accumulators, int64_t i,
                       T neg_above, T epsilon) {
    const T below = accumulators.max_neg[i] + epsilon;
    if (accumulators.max_neg[i] != -infinity<T>() && accumulators.min_pos[i] < below)
        return {below, neg_above};
    accumulators.neg_a[i] = formula.neg == Accumulator::kLogSumExp ? -infinity<T>() : T(0);
    accumulators.neg_b[i] = T(0);
    accumulators.max_neg[i] = -infinity<T>();
    return Bounds<T>::none();
}

// What a row's accumulators make of it.
template <typename T>
struct FinishedRow {
    RowDerivatives<T> loss;
    T neg_value, pos_value, count[2];
    bool poisoned;

    // positives, negatives: how many pairs the row has, kept or not.
    FinishedRow(const TileKernels<T>& formula, const double* params, bool mining, Reduction reduction,
                const RowAccumulators<T>& accumulators, int64_t i, int64_t positives, int64_t negatives,
                bool finite) {
        Gathered<T> row;
        row.neg = neg_value = accumulators.neg_value(formula, i);
        row.pos = pos_value = accumulators.pos_value(formula, i);
        if (formula.neg == Accumulator::kSum) row.neg_count = accumulators.neg_a[i];
        if (formula.pos == Accumulator::kSum) row.pos_count = accumulators.pos_a[i];
        loss = formula.row(params, row, accumulators.pos_context[i]);
        const bool some = positives > 0 || negatives > 0;
        poisoned = !finite && some && can_have_loss(formula, mining, positives, negatives);
        if (poisoned) loss.part[0] = std::numeric_limits<T>::quiet_NaN();
        const bool kept_pos = formula.pos == Accumulator::kSum ? accumulators.pos_a[i] > T(0)
                                                               : accumulators.pos_a[i] > -infinity<T>();
        const bool valid = mining ? kept_pos || accumulators.max_neg[i] > -infinity<T>() : some;
        for (int k = 0; k < 2; ++k) {
            count[k] = loss.count[k];
            if (formula.count != Count::kRows) continue;
            if (reduction == Reduction::kMeanNonzero) count[k] = loss.part[k] != T(0);
            if (reduction == Reduction::kMeanValid && formula.parts == 1) count[k] = valid;
        }
    }
};

// What the losses of some rows add up to.
struct Total {
    double part[2] = {0, 0}, count[2] = {0, 0};
    bool poisoned = false;

    void add(const Total& other) {
        for (int k = 0; k < 2; ++k) {
            part[k] += other.part[k];
            count[k] += other.count[k];
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
          mine_self_pair_(!batch.square && problem.mine_self_pair),
          reduction_(problem.reduction),
          count_nonzero_(kernels_.count == Count::kPairs && reduction_ == Reduction::kMeanNonzero),
          accumulators_(batch.n, kernels_.neg, kernels_.pos),
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
                if (above == -infinity<T>()) above = accumulators_.min_pos[i] - T(mining_.epsilon);
            });
        }
        pass([&](const TileAt& at) { return active(at) && batch_.holds_negatives(at); }, Kinds::kNegatives);
        each_row([&](int64_t i) {
            if (mining_.on)
                set_bounds(i, close_bounds(kernels_, accumulators_, i, batch_.stats.neg_above[i],
                                           T(mining_.epsilon)));
            if (kernels_.context) batch_.stats.neg_value[i] = accumulators_.neg_value(kernels_, i);
        });
        pass(with_positives, Kinds::kPositives);
    }

    // What accumulate does of one stage, for columns that are one block of several: the rows' accumulators,
    // bounds and values are those of the blocks before (blocks.cpp).
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
    RowAccumulators<T>& accumulators() { return accumulators_; }

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
        return mine_self_pair_ ? batch_.same_label(i) : batch_.positives(i);
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
            batch_.for_tiles(wave, [&](int64_t k) { some[k] = work(wave[k], parts[k]); });
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
        batch_.tiles.for_each_tile_group(batch_.tiles.col_blocks, [&](const Tiles::TileGroup& tile_group) {
            if (many) return;
            const auto wanted_here = [&](const TileAt& at) {
                return batch_.is_cached(at) && !known_[at.index] && wanted(at);
            };
            batch_.tiles.gather(tile_group, few, wanted_here, ahead, [&](auto&) { many = true; });
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
                if (mine_self_pair_) tile.own = nullptr;
                kernels_.min_positives(tile, parts);
                return true;
            },
            [&](const LineParts<T>& of, int64_t first, int lines) {
                T* least = accumulators_.min_pos + first;
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
                    kernels_.merge(kernels_.neg, lines, of.neg_a, of.neg_b, accumulators_.neg_a + r,
                                   accumulators_.neg_b + r);
                if (negatives && mining_.on) {
                    T* most = accumulators_.max_neg + r;
                    for (int i = 0; i < lines; ++i) most[i] = std::max(most[i], of.max_neg[i]);
                }
                if (!positives) return;
                kernels_.merge(kernels_.pos, lines, of.pos_a, of.pos_b, accumulators_.pos_a + r,
                               accumulators_.pos_b + r);
                if (!kernels_.context) return;
                for (int i = 0; i < lines; ++i) accumulators_.pos_context[r + i] += of.pos_context[i];
            });
    }

    void finish_row(int64_t i, bool finite, T* each, Total& total) {
        const RowStats<T>& stats = batch_.stats;
        const FinishedRow<T> row(kernels_, batch_.params, mining_.on, reduction_, accumulators_, i,
                                 batch_.positives(i), batch_.negatives(i), finite);
        stats.neg_value[i] = row.neg_value;
        stats.pos_value[i] = row.pos_value;
        stats.d_neg[i] = row.loss.d_neg;
        stats.d_pos[i] = row.loss.d_pos;
        if (each) each[batch_.plan.row_order[i]] = row.loss.part[0] + row.loss.part[1];
        total.poisoned = total.poisoned || row.poisoned;
        for (int k = 0; k < 2; ++k) {
            total.part[k] += row.loss.part[k];
            total.count[k] += row.count[k];
        }
    }

    Batch<T>& batch_;
    const TileKernels<T>& kernels_;
    const Mining mining_;
    const bool mine_self_pair_;
    const Reduction reduction_;
    const bool count_nonzero_;
    RowAccumulators<T> accumulators_;
    std::vector<uint8_t> block_active_, known_;
};

template <typename T>
ForwardResult forward(const Call& call) {
    const Problem problem = describe(call);
    const References refs(call);
    const int64_t n = call.embeddings.size(0);
    const Layout<int64_t> layout(n, refs.capacity, problem.square, sizeof(T), call.save_for_backward);
    const auto options = call.embeddings.options().dtype(c10::CppTypeToScalarType<T>::value);
    Tensor saved = at::empty({layout.bytes}, options.dtype(at::kByte));
    auto* bytes = saved.data_ptr<uint8_t>();
    std::memset(bytes, 0, layout.tiles);

    const Tensor row_labels = call.labels.contiguous();
    const Tensor col_labels = problem.square ? row_labels : refs.labels->contiguous();
    make_plan(row_labels.const_data_ptr<int64_t>(), n, col_labels.const_data_ptr<int64_t>(), refs.count(call),
              problem.square, reinterpret_cast<int32_t*>(bytes + layout.plan));
    const bool once = !problem.mining.on && !tile_kernels<T>(problem.formula).context;
    Batch<T> batch(call, refs, problem, layout, bytes, once);

    const bool each = problem.reduction == Reduction::kNone;
    Tensor loss = each                  ? at::empty({n}, options)
                  : problem.return_sums ? at::empty({4}, options)
                                        : at::empty({}, options);
    T* out = loss.data_ptr<T>();
    Forward<T> pass(batch, problem);
    // Where points are packed on the way a number that is not finite is found on the way, and what was
    // folded until then is not used.
    if (batch.rows.finite && batch.cols.finite) pass.accumulate();
    const bool finite = batch.rows.finite && batch.cols.finite;
    const Total total = pass.finish(finite, each ? out : nullptr);

    const RowStats<T>& stats = batch.stats;
    *stats.poisoned = total.poisoned;
    double sum = 0;
    for (int k = 0; k < 2; ++k) {
        const bool divided = problem.reduction != Reduction::kSum && !each;
        const double scale = !divided ? 1.0 : total.count[k] > 0 ? 1.0 / total.count[k] : 0.0;
        stats.scale[k] = static_cast<T>(scale);
        sum += total.poisoned ? total.part[k] : total.part[k] * scale;
        if (!each && problem.return_sums) {
            out[k] = static_cast<T>(total.part[k]);
            out[2 + k] = static_cast<T>(total.count[k]);
        }
    }
    if (!each && !problem.return_sums) *out = static_cast<T>(sum);
    return {loss, saved};
}

}  // namespace dml::cpu
