#pragma once

#include "losses/formula.h"

namespace dml {

// The sums over a row's negatives that ranked list loss divides (Wang et al., "Ranked List Loss for Deep Metric
// Learning", CVPR 2019, equations 5 to 8): with x = s - level > 0 for a negative that is too near and the weight
// w = exp(temperature x), the sum of w, or of w x with `moment`. Positives count for nothing.
template <typename T>
struct RankedList : FormulaDefaults {
    static constexpr Accumulator kNeg = Accumulator::kSum, kPos = Accumulator::kSum;
    static constexpr bool kHinge = true;
    static constexpr bool kNeedsNeg = true;
    static constexpr const char* kParams = "level, temperature, moment";

    T level, temperature, moment;

    DML_INLINE explicit RankedList(Params<T> params)
        : level(T(params[0])), temperature(T(params[1])), moment(T(params[2])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        const S x = s - level;
        const S w = exp_fast(temperature * x);
        const S term = moment != T(0) ? w * x : w;
        return x > T(0) ? term : S(0);
    }
    template <typename S>
    DML_INLINE S pos_term(S) const {
        return S(0);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return g.neg;
    }
};

}  // namespace dml
