// Backward's view of a row: dL/ds of its pairs, times the upstream gradient.
#pragma once

#include "cuda/pairs/row_stats.cuh"

namespace dml::cuda {

// The factors of the derivatives of a row's positives and negatives: the upstream gradient times the
// reduction's scale.
template <typename Acc>
struct Upstream {
    const Acc* grad;  // [1], [rows] or [parts]
    Reduction reduction;
    bool divide;
    int last_part;

    DML_DEVICE Acc part_factor(const RowStats<Acc>& row_stats, int64_t i, int part) const {
        const int64_t at = reduction == Reduction::kNone ? i : divide ? 0 : part;
        return grad[at] * row_stats.header[kScale + part];
    }
    DML_DEVICE Acc pos(const RowStats<Acc>& row_stats, int64_t i) const {
        return part_factor(row_stats, i, 0);
    }
    DML_DEVICE Acc neg(const RowStats<Acc>& row_stats, int64_t i) const {
        return part_factor(row_stats, i, last_part);
    }
};

// The factor of a whole gradient: 1; NaN if an input is not finite; 0 if no row has the pairs it needs, which
// also hides inputs that are not finite.
template <typename Acc>
DML_DEVICE Acc gradient_factor(const RowStats<Acc>& row_stats, const Upstream<Acc>& upstream) {
    const Acc health = row_stats.header[kHealth];
    if (upstream.reduction == Reduction::kNone || health == Acc(0)) return health;
    const Acc first = upstream.pos(row_stats, 0), last = upstream.neg(row_stats, 0);
    return is_finite(first) && is_finite(last) ? health : not_a_number<Acc>();
}

// One row's numbers in backward.
template <typename Acc>
struct RowWeight {
    Bounds<Acc> bounds = Bounds<Acc>::none();
    Acc neg = 0, pos = 0;      // values of the accumulators
    Acc d_neg = 0, d_pos = 0;  // derivative of the loss with respect to them

    static DML_DEVICE RowWeight load(const RowStats<Acc>& s, int64_t i, const Upstream<Acc>& upstream) {
        RowWeight w;
        w.bounds = {s.pos_below[i], s.neg_above[i]};
        w.neg = s.neg[i];
        w.pos = s.pos[i];
        w.d_neg = s.d_neg[i] * upstream.neg(s, i);
        w.d_pos = s.d_pos[i] * upstream.pos(s, i);
        return w;
    }

    // dL_i/ds; exactly 0 where the pair was not kept.
    template <typename Formula>
    DML_DEVICE Acc of(const Formula& formula, bool positive, Acc s) const {
        if (positive ? !(s < bounds.pos_below) : !(s > bounds.neg_above)) return Acc(0);
        Acc w = 0;
        if (!positive || Formula::kPosInNeg) {
            w = d_neg * formula.neg_derivative(s);
            if constexpr (Formula::kNeg == Accumulator::kLogSumExp) w *= std::exp(formula.neg_term(s) - neg);
        }
        if (Formula::kOnlyNegatives ? !positive : positive) {
            const Acc context = Formula::kContext ? neg : Acc(0);
            Acc by_pos = d_pos * formula.pos_derivative(s, context);
            if constexpr (Formula::kPos == Accumulator::kLogSumExp)
                by_pos *= std::exp(formula.pos_term(s, context) - pos);
            w += by_pos;
        }
        return w;
    }
};

// From dL/ds of a distance to the weight of the points: divided by the distance; 0 where that is 0.
template <typename Acc>
DML_DEVICE Acc by_distance(Acc weight, Acc s) {
    Acc by;
    if constexpr (sizeof(Acc) == 4) {
        by = __fdividef(weight, -s);  // a distance is no subnormal number
    } else {
        by = weight / -s;
    }
    return s < Acc(0) ? by : Acc(0);
}

}  // namespace dml::cuda
