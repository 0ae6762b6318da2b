// Small batches, forward: mining, accumulators and losses of a row block, a warp a row.
#pragma once

#include "cuda/pairs/any_formula.cuh"
#include "cuda/pairs/row_block.cuh"

namespace dml::cuda {

// One accumulator over pairs, by a warp.
template <typename Formula, Accumulator kAccumulator, typename Acc, typename Term>
DML_DEVICE Running<kAccumulator, Acc> gather_row(const LaneSet& kept, const Term& term, Acc zero_counts) {
    Running<kAccumulator, Acc> accumulator;
    if constexpr (kAccumulator == Accumulator::kLogSumExp) {
        kept.for_each([&](int j) {
            const Acc z = term(j);
            accumulator.a = z > accumulator.a ? z : accumulator.a;
        });
        accumulator.a = warp_max(accumulator.a);
        kept.for_each([&](int j) { accumulator.b += std::exp(term(j) - accumulator.a); });
    } else {
        kept.for_each([&](int j) {
            const Acc t = term(j);
            accumulator.a += Formula::is_nonzero(t) ? Acc(1) : zero_counts;
            accumulator.b += t;
        });
        accumulator.a = warp_sum(accumulator.a);
    }
    accumulator.b = warp_sum(accumulator.b);
    return accumulator;
}

// What a warp knows of a row before the formula looks at it: its bounds, and which pairs they keep.
template <typename Acc>
struct MinedRow {
    Bounds<Acc> bounds;
    bool had_both;
    LaneSet positives, kept;
};

// s: the similarities of row i.
template <typename T, typename Acc>
DML_DEVICE MinedRow<Acc> mine_row(const RowBlockPairs<T, Acc>& pairs, int64_t i, Acc* s, Mining mining) {
    const int64_t cols = pairs.cols.points.rows;
    const int64_t label = pairs.rows.labels[i];
    MinedRow<Acc> row;
    mark_diagonal(pairs, i, s);
    if (!pairs.mine_self_pair) mark_self(pairs, i, s);
    Extremes<Acc> hardest;
    for_each_of_lane(cols, [&](int k, int j) {
        const bool positive = pairs.cols.labels[j] == label;
        row.positives.add(k, positive);
        hardest.add(positive, s[j]);
    });
    hardest = {warp_min(hardest.min_pos), warp_max(hardest.max_neg)};
    row.bounds = mining.on ? hardest.mined(Acc(mining.epsilon)) : Bounds<Acc>::all();
    row.had_both = hardest.has_both();
    if (pairs.mine_self_pair) mark_self(pairs, i, s);
    for_each_of_lane(cols, [&](int k, int j) {
        row.kept.add(k, row.positives.has(k) ? s[j] < row.bounds.pos_below : s[j] > row.bounds.neg_above);
    });
    return row;
}

// A warp finishes row i.
template <typename Formula, typename T, typename Acc>
DML_DEVICE void gather_and_finish(const RowBlockPairs<T, Acc>& pairs, int64_t i, const Acc* s,
                                  const MinedRow<Acc>& mined, const Formula& formula, bool mining,
                                  bool count_zeros, const RowStats<Acc>& row_stats,
                                  const Results<Acc>& results) {
    const LaneSet positives = {mined.kept.bits & mined.positives.bits};
    const LaneSet negatives = {Formula::kPosInNeg ? mined.kept.bits
                                                  : mined.kept.bits & ~mined.positives.bits};
    const Acc zero_counts = count_zeros ? Acc(1) : kZeroCounts<Acc>;
    Gathering<Formula, Acc> row;
    row.neg = gather_row<Formula, Formula::kNeg, Acc>(
        negatives, [&](int j) { return formula.neg_term(s[j]); }, zero_counts);
    Acc context = 0;
    if constexpr (Formula::kContext) {
        context = row.neg.value(Formula::kPlusOne);
        Acc derivative = 0;
        positives.for_each([&](int j) { derivative += formula.pos_context(s[j], context); });
        row.neg.a = context;
        row.neg.b = warp_sum(derivative);
    }
    row.pos = gather_row<Formula, Formula::kPos, Acc>(
        positives, [&](int j) { return formula.pos_term(s[j], context); }, zero_counts);
    if (lane_id() != 0) return;
    results.store(i, finish_row(row_stats, i, formula, row, mined.bounds, mining, mined.had_both,
                                pairs.rows.norms[i], results));
}

template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kRowBlockThreads, 1)
    row_block_forward(const __grid_constant__ RowBlockPairs<T, Acc> all,
                      const __grid_constant__ AnyFormula<Acc> any_formula, Mining mining, bool count_zeros,
                      RowStats<Acc> row_stats, Results<Acc> results) {
    using Layout = RowBlockLayout<T, Acc>;
    const RowBlockPairs<T, Acc> pairs = all.in_use();
    Acc* sims = shared_array<Acc>(Layout::kSims, kRowBlockRows * pairs.pitch);
    const int64_t row0 = int64_t(blockIdx.x) * kRowBlockRows;
    row_block_similarities<Math, true>(pairs, row0, sims);
#pragma unroll 1
    for (int r = warp_id(); r < kRowBlockRows; r += kRowBlockWarps) {
        if (row0 + r >= pairs.rows.points.rows) break;
        Acc* s = sims + r * pairs.pitch;
        const MinedRow<Acc> mined = mine_row(pairs, row0 + r, s, mining);
        any_formula.visit([&](const auto& formula) {
            gather_and_finish(pairs, row0 + r, s, mined, formula, mining.on, count_zeros, row_stats, results);
        });
    }
}

}  // namespace dml::cuda
