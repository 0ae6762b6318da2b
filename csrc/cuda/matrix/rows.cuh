// The second kernel of the matrix path: a row's similarities become its loss, and then dL_i/ds_ij in their
// place. A warp has a row, or a block where rows are long: hardest pairs, bounds, the largest kept terms,
// accumulators, the formula, derivatives. The block that finishes last, as a ticket tells, reduces all
// results in the order of the blocks; no block waits for another.
#pragma once

#include "cuda/matrix/saved_matrix.cuh"
#include "cuda/matrix/team.cuh"
#include "cuda/pairs/reduce.cuh"
#include "cuda/pairs/row_weights.cuh"

namespace dml::cuda {

// Rows [first, first + saved.rows) of a batch, and how their pairs are mined.
template <typename Acc>
struct MatrixRows {
    SavedMatrix<Acc> saved;
    int64_t first;
    const int64_t *labels, *ref_labels;  // [all rows], [refs]
    int64_t refs;
    const int64_t* num_valid_refs;
    const int64_t* self_index;  // [all rows], or null
    bool square, mine_self_pair;
    Mining mining;
};

template <typename Acc>
struct RowsTask : MatrixRows<Acc> {
    bool euclidean;
    bool count_zeros;      // whether a term of 0 counts
    bool has_backward;     // else no derivative is stored
    Results<Acc> results;  // a slot for each block
    uint8_t* flags;        // [rows]
    unsigned* ticket;      // 0 at the start
    Division division;
    Acc* loss;
};

// Shared memory: scratch of the team, the block's results, whether it is the last.
template <typename Acc>
struct RowsLayout {
    static constexpr int kScratch = 0, kScratchSize = kMostMerged * kTeamWarps;
    static constexpr int kResults = kScratchSize * int(sizeof(Acc));
    static constexpr int kReduce = kResults + kResultNumbers * kTeamWarps * int(sizeof(Acc));
    static constexpr int kLast = kReduce + kWarpSize * int(sizeof(Acc));
    static constexpr int kBytes = kLast + 16;
};

// The least and the greatest similarity of a row's kept negatives, and of its kept positives.
template <typename Acc>
struct KeptRange {
    Acc greatest[2] = {-infinity<Acc>(), -infinity<Acc>()},
        negated_least[2] = {-infinity<Acc>(), -infinity<Acc>()};

    DML_DEVICE void add(int kind, Acc s) {
        greatest[kind] = std::fmax(greatest[kind], s);
        negated_least[kind] = std::fmax(negated_least[kind], -s);
    }
    // The largest term(s), which is at one of the ends; of negatives, positives, or all of them.
    template <typename Term>
    DML_DEVICE Acc largest(bool negatives, bool positives, const Term& term) const {
        Acc high = -infinity<Acc>(), negated_low = -infinity<Acc>();
        if (negatives) {
            high = greatest[0];
            negated_low = negated_least[0];
        }
        if (positives) {
            high = std::fmax(high, greatest[1]);
            negated_low = std::fmax(negated_low, negated_least[1]);
        }
        return high == -infinity<Acc>() ? high : std::fmax(term(high), term(-negated_low));
    }
};

// The pairs of one row.
template <bool kBlock, typename Acc>
struct RowPairs {
    const Team<kBlock, Acc>& team;
    Acc* pairs;             // [cols] similarities
    const int64_t* labels;  // [cols]
    int cols, self;         // self: the column that is the row itself, or -1
    int64_t label;

    // Those of row `i` of the matrix, of which so many columns are in use.
    static DML_DEVICE RowPairs of(const MatrixRows<Acc>& rows, const Team<kBlock, Acc>& team, int64_t i,
                                  int64_t cols) {
        const int64_t row = rows.first + i, label = rows.labels[row];
        int64_t self = rows.square ? row : rows.self_index ? rows.self_index[row] : -1;
        if (self < 0 || self >= cols || rows.ref_labels[self] != label) self = -1;  // a pair like others
        return {team, rows.saved.pairs + i * rows.saved.pitch, rows.ref_labels, int(cols), int(self), label};
    }

    // f(similarity, whether positive) for this thread's pairs in ascending order; NaN and false for `left_out` and past
    // the last column, so that loops have no remainder.
    template <int Unroll, typename F>
    DML_DEVICE void for_each(int left_out, const F& f) const {
#pragma unroll 1
        for (int first = 0; first < cols; first += Unroll * team.kThreads) {
            Acc s[Unroll];
            bool positive[Unroll];
#pragma unroll
            for (int u = 0; u < Unroll; ++u) {
                const int j = first + u * team.kThreads + team.thread();
                const bool inside = j < cols && j != left_out;
                s[u] = inside ? pairs[j] : not_a_number<Acc>();
                positive[u] = inside && labels[j] == label;
            }
#pragma unroll
            for (int u = 0; u < Unroll; ++u) f(s[u], positive[u]);
        }
    }

    // 1. The hardest pairs. Mining may see the row itself.
    DML_DEVICE Extremes<Acc> find_hardest(const MatrixRows<Acc>& rows) const {
        Extremes<Acc> hardest;
        for_each<4>(!rows.square && rows.mine_self_pair ? -1 : self,
                    [&](Acc s, bool positive) { hardest.add(positive, s); });
        Acc both[2] = {hardest.max_neg, -hardest.min_pos};
        team.merge(both, Maximum{});
        return {-both[1], both[0]};
    }

    // 2. Where the largest terms of the kept pairs lie.
    DML_DEVICE KeptRange<Acc> find_range(const Bounds<Acc>& bounds) const {
        KeptRange<Acc> range;
        for_each<4>(self, [&](Acc s, bool positive) {
            if (!positive && s > bounds.neg_above) range.add(0, s);
            if (positive && s < bounds.pos_below) range.add(1, s);
        });
        Acc ends[4] = {range.greatest[0], range.greatest[1], range.negated_least[0], range.negated_least[1]};
        team.merge(ends, Maximum{});
        return {{ends[0], ends[1]}, {ends[2], ends[3]}};
    }

    // 3. Both accumulators. zero_counts: how much a term of 0 counts.
    template <typename Formula>
    DML_DEVICE Gathering<Formula, Acc> gather(const Formula& formula, const Bounds<Acc>& bounds,
                                              const KeptRange<Acc>& range, Acc zero_counts) const {
        Gathering<Formula, Acc> row;
        if constexpr (Formula::kNeg == Accumulator::kLogSumExp)
            row.neg.a = range.largest(true, Formula::kPosInNeg, [&](Acc s) { return formula.neg_term(s); });
        if constexpr (Formula::kPos == Accumulator::kLogSumExp)
            row.pos.a = range.largest(false, true, [&](Acc s) { return formula.pos_term(s, Acc(0)); });
        const auto add = [&](auto& running, auto is_exp, Acc term) {
            if constexpr (decltype(is_exp)::value) {
                running.b += std::exp(term - running.a);
            } else {
                running.a += Formula::is_nonzero(term) ? Acc(1) : zero_counts;
                running.b += term;
            }
        };
        constexpr std::bool_constant<Formula::kNeg == Accumulator::kLogSumExp> neg_exp{};
        constexpr std::bool_constant<Formula::kPos == Accumulator::kLogSumExp> pos_exp{};
        for_each<1>(self, [&](Acc s, bool positive) {
            if (positive ? !(s < bounds.pos_below) : !(s > bounds.neg_above)) return;
            if (!positive || Formula::kPosInNeg) add(row.neg, neg_exp, formula.neg_term(s));
            if constexpr (!Formula::kContext) {
                if (Formula::kOnlyNegatives ? !positive : positive)
                    add(row.pos, pos_exp, formula.pos_term(s, Acc(0)));
            }
        });
        Acc sums[4] = {row.neg.b, row.pos.b, neg_exp ? Acc(0) : row.neg.a, pos_exp ? Acc(0) : row.pos.a};
        team.merge(sums, Plus{});
        row.neg.b = sums[0];
        row.pos.b = sums[1];
        if constexpr (!neg_exp) row.neg.a = sums[2];
        if constexpr (!pos_exp) row.pos.a = sums[3];
        if constexpr (Formula::kContext) {
            const Acc context = row.neg.value(Formula::kPlusOne);
            Acc by_context = 0;
            for_each<1>(self, [&](Acc s, bool positive) {
                if (!positive || !(s < bounds.pos_below)) return;
                add(row.pos, pos_exp, formula.pos_term(s, context));
                by_context += formula.pos_context(s, context);
            });
            Acc of_positives[3] = {by_context, row.pos.a, row.pos.b};
            team.merge(of_positives, Plus{});
            row.neg = {context, of_positives[0]};
            row.pos = {of_positives[1], of_positives[2]};
        }
        return row;
    }

    // 4. What each parameter that learns does to the row's loss, by its terms and for constant ones.
    template <typename Formula>
    DML_DEVICE void store_by_params(const Formula& formula, const RowWeight<Acc>& weight,
                                    const FinishedRow<Acc>& row, const RowsByParams<Acc>& by_params,
                                    int64_t i) const {
        constexpr int kLast = Formula::kParts - 1;
#pragma unroll 1
        for (int k = 0; k < Formula::kParamCount; ++k) {
            const auto derived = derived_by<Formula, Acc>(by_params.learned, formula, k);
            Acc sums[2] = {Acc(0), Acc(0)}, part[2];
            for_each<1>(self, [&](Acc s, bool positive) {
                const Acc x = weight.of(derived, positive, s);
                if (positive) sums[0] += x;
                if (!positive) sums[kLast] += x;
            });
            team.merge(sums, Plus{});
            row_by_param(derived, row, part);
            if (team.thread() == 0) {
                by_params.at(k, 0, i) = part[0] + sums[0];
                by_params.at(k, 1, i) = part[1] + sums[1];
            }
        }
    }

    // 5. Derivatives, divided by the distance where similarities are distances; and which chunks have any.
    template <typename Formula>
    DML_DEVICE void store_derivatives(const Formula& formula, const RowWeight<Acc>& row, bool euclidean,
                                      uint8_t* occupied) const {
#pragma unroll 1
        for (int span = team.warp(); span * kSpan < cols; span += team.kWarps) {
            uint32_t bits = 0;
#pragma unroll 1
            for (int first = 0; first < kSpan && span * kSpan + first < cols; first += kWarpSize) {
                const int j = span * kSpan + first + lane_id();
                Acc u = 0;
                if (j < cols) {
                    const Acc s = pairs[j];
                    if (j != self) u = row.of(formula, labels[j] == label, s);
                    if (euclidean) u = by_distance(u, s);
                    pairs[j] = u;
                }
                bits |= uint32_t(warp_any(u != Acc(0))) << first / kChunk;
            }
            if (lane_id() == 0) occupied[span] = uint8_t(bits);
        }
    }
};

// Row i, by a team: what it adds to the result.
template <bool kBlock, typename Acc>
DML_DEVICE RowResult<Acc> finish_matrix_row(const RowsTask<Acc>& task, const AnyFormula<Acc>& any_formula,
                                            const Team<kBlock, Acc>& team, int64_t i, int64_t cols) {
    const SavedMatrix<Acc>& saved = task.saved;
    const auto pairs = RowPairs<kBlock, Acc>::of(task, team, i, cols);
    Bounds<Acc> bounds = Bounds<Acc>::all();
    bool had_both = false;
    if (task.mining.on) {
        const Extremes<Acc> hardest = pairs.find_hardest(task);
        bounds = hardest.mined(Acc(task.mining.epsilon));
        had_both = hardest.has_both();
    }
    const KeptRange<Acc> range = pairs.find_range(bounds);
    RowResult<Acc> result;
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        static_assert(!(Formula::kPosInNeg && Formula::kParts == 2),
                      "a positive's derivative has one upstream gradient, that of its part");
        const auto gathered =
            pairs.gather(formula, bounds, range, task.count_zeros ? Acc(1) : kZeroCounts<Acc>);
        const FinishedRow<Acc> row =
            conclude_row(formula, gathered, bounds, task.mining.on, had_both, saved.query_norms[i],
                         task.results.reduction, task.results.weight(i));
        if (team.warp() == 0 && lane_id() == 0) {
            task.flags[i] = row.eligible ? kEligible : uint8_t(0);
            if (task.results.rows) task.results.rows[i] = row.total();
        }
        result = row.result;
        if (!task.has_backward) return;
        const RowWeight<Acc> weight = {row.bounds, row.values.neg, row.values.pos, row.loss.d_neg,
                                       row.loss.d_pos};
        if (task.results.by_params.numbers)
            pairs.store_by_params(formula, weight, row, task.results.by_params, i);
        pairs.store_derivatives(formula, weight, task.euclidean, saved.occupied + i * saved.spans);
    });
    return result;
}

template <bool kBlock, typename Acc>
__global__ void __launch_bounds__(kTeamThreads,
                                  sizeof(Acc) == 8 ? 1 : 2)  // double takes 128 registers and more
    finish_matrix_rows(const __grid_constant__ RowsTask<Acc> task,
                       const __grid_constant__ AnyFormula<Acc> any_formula) {
    using Layout = RowsLayout<Acc>;
    constexpr int kRows = kBlock ? 1 : kTeamWarps;  // of a block at once
    wait_for_previous_kernel();
    const Team<kBlock, Acc> team = {shared_array<Acc>(Layout::kScratch, Layout::kScratchSize)};
    Acc* numbers = shared_array<Acc>(Layout::kResults, kResultNumbers * kTeamWarps);
    int* last = shared_array<int>(Layout::kLast, 4);
    const int64_t rows = task.saved.rows, used = rows_in_use(task.num_valid_refs, task.refs);
    RowResult<Acc> total;
#pragma unroll 1
    for (int64_t i = int64_t(blockIdx.x) * kRows + (kBlock ? 0 : uniform_warp_id()); i < rows;
         i += int64_t(gridDim.x) * kRows) {
        total.add(finish_matrix_row<kBlock>(task, any_formula, team, i, used));
    }
    if (kBlock && warp_id() != 0) total = {};
    // References matter by their norms only, and not at all without rows.
    if (!task.square && rows > 0) {
        Acc found[2] = {};
#pragma unroll 1
        for (int64_t j = int64_t(blockIdx.x) * kTeamThreads + threadIdx.x; j < used;
             j += int64_t(gridDim.x) * kTeamThreads) {
            found[0] += Acc(!is_finite(task.saved.ref_norms[j]));
            found[1] += Acc(is_very_long(task.saved.ref_norms[j]));
        }
        Team<false, Acc>{nullptr}.merge(found, Plus{});
        total.not_finite += found[0];
        total.very_long += found[1];
    }
    if (lane_id() == 0) Results<Acc>{numbers, kTeamWarps, nullptr, {}, nullptr, {}}.store(warp_id(), total);
    block_sync();
    if (int(threadIdx.x) < kResultNumbers) {
        Acc sum = 0;
        for (int w = 0; w < kTeamWarps; ++w) sum += numbers[threadIdx.x * kTeamWarps + w];
        task.results.data[threadIdx.x * task.results.slots + blockIdx.x] = sum;
    }
    block_sync();
    if (threadIdx.x == 0) *last = take_ticket(task.ticket) + 1 == gridDim.x;
    block_sync();
    if (!*last) return;
    RowStats<Acc> row_stats = {};
    row_stats.header = task.saved.header;
    row_stats.flags = task.flags;
    reduce_slots<kTeamThreads, 1>(row_stats, rows, task.results, task.division,
                                  shared_array<Acc>(Layout::kReduce, kWarpSize), task.loss);
}

}  // namespace dml::cuda
