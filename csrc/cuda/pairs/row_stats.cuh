// What a row accumulates over its kept pairs: the running numbers, the loss they come to, and what backward
// needs of them. Everything here is compiled for one formula and called behind AnyFormula::visit.
#pragma once

#include "cuda/pairs/any_formula.cuh"
#include "cuda/pairs/rows.cuh"
#include "cuda/pairs/saved_sizes.h"

namespace dml::cuda {

// A formula whose positives see the value of the negatives' accumulator takes two passes over the tiles.
enum class Stage { kBoth, kNegatives, kPositives };

// The saved numbers of rows: one array for each, so that neighbouring threads read neighbours.
template <typename Acc>
struct RowStats {
    Acc* header;                                             // [kHeader]
    Acc *neg_above, *pos_below, *neg, *pos, *d_neg, *d_pos;  // [rows] each
    uint8_t* flags;                                          // [rows]
};
inline constexpr int kScale = 0;   // [2] the reduction's factor for each part
inline constexpr int kHealth = 2;  // 1; 0 where no gradient is asked for; NaN where inputs are not finite
inline constexpr int kRange = 3;   // a power of two that keeps tiles' weights in range
inline constexpr uint8_t kEligible = 1;  // the labels give the row the pairs that its loss needs

// An accumulator's two running numbers: largest term and sum of exp(term - largest); or count and sum of
// terms.
template <Accumulator kAccumulator, typename Acc>
struct Running {
    Acc a = kAccumulator == Accumulator::kLogSumExp ? -infinity<Acc>() : Acc(0), b = Acc(0);

    // Several at once, in order, so that no exponential waits for another.
    template <int Count>
    DML_DEVICE void merge(const Acc (&more_a)[Count], const Acc (&more_b)[Count]) {
        if constexpr (kAccumulator == Accumulator::kLogSumExp) {
            Acc top = a;
#pragma unroll
            for (int k = 0; k < Count; ++k) top = more_a[k] > top ? more_a[k] : top;
            const Acc base = top == -infinity<Acc>() ? Acc(0) : top;  // then all are empty
            b *= std::exp(a - base);
#pragma unroll
            for (int k = 0; k < Count; ++k) b += more_b[k] * std::exp(more_a[k] - base);
            a = top;
        } else {
#pragma unroll
            for (int k = 0; k < Count; ++k) {
                a += more_a[k];
                b += more_b[k];
            }
        }
    }
    // Whether any pair was kept: see kZeroCounts.
    DML_DEVICE bool any() const {
        return kAccumulator == Accumulator::kLogSumExp ? a != -infinity<Acc>() : a > Acc(0);
    }
    DML_DEVICE Acc value(bool plus_one) const {
        return kAccumulator == Accumulator::kLogSumExp ? LogSumExp<Acc>{a, b}.value(plus_one) : b;
    }
    DML_DEVICE Acc count() const { return kAccumulator == Accumulator::kSum ? std::floor(a) : Acc(0); }
};

// Where only terms that are not 0 count, the others count this much: too little to add up to a pair in any
// row, enough to distinguish a row that kept pairs from one that kept none.
template <typename Acc>
inline constexpr Acc kZeroCounts = Acc(1) / Acc(int64_t(1) << 40);

// Both accumulators of a row, or of a tile's line. In the pass over positives with context, neg.a is that
// context and neg.b the sum of the terms' derivatives by it.
template <typename Formula, typename Acc>
struct Gathering {
    Running<Formula::kNeg, Acc> neg;
    Running<Formula::kPos, Acc> pos;

    // q: quantities of several tiles, in order.
    template <Stage kStage, int Count>
    DML_DEVICE void merge(const Acc (&q)[4][Count]) {
        if constexpr (kStage == Stage::kPositives) {
#pragma unroll
            for (int k = 0; k < Count; ++k) neg.b += q[1][k];
        } else {
            neg.merge(q[0], q[1]);
        }
        if constexpr (kStage != Stage::kNegatives) pos.merge(q[2], q[3]);
    }
};
template <typename Formula, Stage kStage, typename Acc>
DML_DEVICE void no_quantities(Acc (&q)[4]) {
    const Gathering<Formula, Acc> none;
    q[0] = none.neg.a;
    q[1] = none.neg.b;
    q[2] = none.pos.a;
    q[3] = none.pos.b;
}

// A row's running numbers, which lie in the arrays of its final ones until it is finished.
template <typename Acc>
struct RunningRow {
    const RowStats<Acc>& row_stats;
    int64_t i;

    DML_DEVICE Acc& min_pos() const { return row_stats.neg_above[i]; }
    DML_DEVICE Acc& max_neg() const { return row_stats.pos_below[i]; }

    template <typename Formula>
    DML_DEVICE Gathering<Formula, Acc> load() const {
        return {{row_stats.neg[i], row_stats.d_neg[i]}, {row_stats.pos[i], row_stats.d_pos[i]}};
    }
    template <typename Formula>
    DML_DEVICE void store(const Gathering<Formula, Acc>& g) const {
        row_stats.neg[i] = g.neg.a;
        row_stats.d_neg[i] = g.neg.b;
        row_stats.pos[i] = g.pos.a;
        row_stats.d_pos[i] = g.pos.b;
    }
};

// The least similar positive and the most similar negative.
template <typename Acc>
struct Extremes {
    Acc min_pos = infinity<Acc>(), max_neg = -infinity<Acc>();

    DML_DEVICE void add(bool positive, Acc s) {  // s may be NaN, which std::fmin and fmax pass over
        if (positive) {
            min_pos = std::fmin(min_pos, s);
        } else {
            max_neg = std::fmax(max_neg, s);
        }
    }
    DML_DEVICE void merge(const Extremes& more) {
        min_pos = more.min_pos < min_pos ? more.min_pos : min_pos;
        max_neg = more.max_neg > max_neg ? more.max_neg : max_neg;
    }
    DML_DEVICE bool has_both() const { return min_pos != infinity<Acc>() && max_neg != -infinity<Acc>(); }

    // The mining rule; a row that lacks either kind keeps nothing. Rounding of the two bounds must not keep
    // pairs of one kind only.
    DML_DEVICE Bounds<Acc> mined(Acc epsilon) const {
        const Bounds<Acc> bounds = {max_neg + epsilon, min_pos - epsilon};
        return min_pos < bounds.pos_below && max_neg > bounds.neg_above ? bounds : Bounds<Acc>::none();
    }
};

// What a row adds to the result.
template <typename Acc>
struct RowResult {
    Acc part[2] = {Acc(0), Acc(0)}, count[2] = {Acc(0), Acc(0)};
    Acc eligible = Acc(0), not_finite = Acc(0), very_long = Acc(0);  // rows

    DML_DEVICE void add(const RowResult& more) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            part[k] += more.part[k];
            count[k] += more.count[k];
        }
        eligible += more.eligible;
        not_finite += more.not_finite;
        very_long += more.very_long;
    }
};
// Where its numbers are.
inline constexpr int kSums = 0, kCounts = 2, kEligibleRows = 4, kNotFinite = 5, kVeryLong = 6,
                     kResultNumbers = 7;

// What parameters that learn do to the rows' losses.
template <typename Acc>
struct RowsByParams {
    const unsigned char* learned;  // the formula's derivatives, as AnyFormula has them
    Acc* numbers;                  // [params, 2, rows]; null: not wanted
    int64_t rows;

    DML_DEVICE Acc& at(int k, int part, int64_t i) const { return numbers[(2 * k + part) * rows + i]; }
};

// [kResultNumbers, slots] sums over one or several rows a slot, merged in order by the reduction.
template <typename Acc>
struct Results {
    Acc* data;
    int64_t slots;
    Acc* rows;  // [rows] each row's loss; null: not wanted
    Reduction reduction;
    const Acc* row_weights;  // [rows]; null: 1
    RowsByParams<Acc> by_params;

    DML_DEVICE Acc weight(int64_t i) const { return row_weights ? row_weights[i] : Acc(1); }

    DML_DEVICE void store(int64_t slot, const RowResult<Acc>& r) const {
        const Acc numbers[kResultNumbers] = {r.part[0],  r.part[1],    r.count[0], r.count[1],
                                             r.eligible, r.not_finite, r.very_long};
#pragma unroll
        for (int k = 0; k < kResultNumbers; ++k) data[k * slots + slot] = numbers[k];
    }
};

// A row's loss, what backward needs of it, and what it adds to the result.
template <typename Acc>
struct FinishedRow {
    Bounds<Acc> bounds;
    Gathered<Acc> values;  // of the accumulators
    RowDerivatives<Acc> loss;
    bool eligible, has_loss;
    Acc weight;
    RowResult<Acc> result;

    DML_DEVICE Acc total() const { return result.part[0] + result.part[1]; }
};

// From a row's accumulators. had_both: whether it had pairs of both kinds before mining; without mining every
// pair was kept, and the accumulators tell. weight: the factor of the row's loss, and so of its derivatives.
template <typename Formula, typename Acc>
DML_DEVICE FinishedRow<Acc> conclude_row(const Formula& formula, const Gathering<Formula, Acc>& row,
                                         Bounds<Acc> bounds, bool mining, bool had_both, Acc norm,
                                         Reduction reduction, Acc weight) {
    Gathered<Acc> g;
    Acc pos_context = Acc(0);
    bool any_neg = row.neg.any();
    if constexpr (Formula::kContext) {
        g.neg = row.neg.a;
        pos_context = row.neg.b;
        any_neg = g.neg != (Formula::kPlusOne ? Acc(0) : -infinity<Acc>());
    } else {
        g.neg = row.neg.value(Formula::kPlusOne);
        g.neg_count = row.neg.count();
    }
    g.pos = row.pos.value(Formula::kPlusOne);
    g.pos_count = row.pos.count();

    const bool any_pos = row.pos.any(), valid = any_pos || any_neg;
    const bool has_loss = row_has_loss(Formula::needed_pairs(), false, any_pos, any_neg);  // of kept pairs
    FinishedRow<Acc> finished = {
        bounds, g, formula.row(g, pos_context), mining ? had_both : has_loss, has_loss, weight, {}};
    RowDerivatives<Acc>& loss = finished.loss;
    if (!has_loss) {
        finished.bounds = Bounds<Acc>::none();
        loss.part[0] = loss.part[1] = loss.d_neg = loss.d_pos = Acc(0);
        finished.values.neg = finished.values.pos = Acc(0);
        loss.nonzero[0] = loss.nonzero[1] = false;
    }
    loss.d_neg *= weight;
    loss.d_pos *= weight;
    RowResult<Acc>& result = finished.result;
    result.eligible = Acc(finished.eligible);
    result.not_finite = Acc(!is_finite(norm));
    result.very_long = Acc(is_very_long(norm));
#pragma unroll
    for (int k = 0; k < Formula::kParts; ++k) {
        result.part[k] = weight * loss.part[k];
        Acc count = loss.count[k];
        if constexpr (Formula::kCount == Count::kRows) {
            if (reduction == Reduction::kMeanValid && Formula::kParts == 1) count = Acc(valid);
        }
        if constexpr (Formula::kCount == Count::kRowsWithLoss) count = Acc(has_loss);
        if constexpr (Formula::kCount != Count::kPairs) {
            if (reduction == Reduction::kMeanNonzero) count = Acc(loss.nonzero[k]);
        }
        result.count[k] = count;
    }
    return finished;
}

// What a parameter, for constant terms, does to the parts of a row's loss.
template <typename Formula, typename Acc>
DML_DEVICE void row_by_param(const DerivedByParam<Acc, Formula>& derived, const FinishedRow<Acc>& row,
                             Acc (&part)[2]) {
    part[0] = part[1] = Acc(0);
    if (row.has_loss && Formula::may_have_loss(row.values)) derived.by_param.row(row.values, part);
    part[0] *= row.weight;
    part[1] *= row.weight;
}

// The same, stored in the row's stats.
template <typename Formula, typename Acc>
DML_DEVICE RowResult<Acc> finish_row(const RowStats<Acc>& row_stats, int64_t i, const Formula& formula,
                                     const Gathering<Formula, Acc>& row, Bounds<Acc> bounds, bool mining,
                                     bool had_both, Acc norm, const Results<Acc>& results) {
    const FinishedRow<Acc> finished =
        conclude_row(formula, row, bounds, mining, had_both, norm, results.reduction, results.weight(i));
    row_stats.neg_above[i] = finished.bounds.neg_above;
    row_stats.pos_below[i] = finished.bounds.pos_below;
    row_stats.neg[i] = finished.values.neg;
    row_stats.pos[i] = finished.values.pos;
    row_stats.d_neg[i] = finished.loss.d_neg;
    row_stats.d_pos[i] = finished.loss.d_pos;
    row_stats.flags[i] = finished.eligible ? kEligible : uint8_t(0);
    if (results.rows) results.rows[i] = finished.total();
    const RowsByParams<Acc>& by_params = results.by_params;
    if (by_params.numbers) {
#pragma unroll 1
        for (int k = 0; k < Formula::kParamCount; ++k) {
            Acc part[2];
            row_by_param(derived_by<Formula, Acc>(by_params.learned, formula, k), finished, part);
            by_params.at(k, 0, i) = part[0];
            by_params.at(k, 1, i) = part[1];
        }
    }
    return finished.result;
}

}  // namespace dml::cuda
