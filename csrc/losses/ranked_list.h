#pragma once

#include "losses/formula.h"

namespace dml {

// The share of a row's negatives in ranked list loss (Wang et al., "Ranked List Loss for Deep Metric Learning",
// CVPR 2019, equations 5 to 8): with x = s - level of the negatives that are too near, x > 0, and the weights
// w = exp(temperature x),
//
//   L_i = sum w x / (sum w + floor)
template <typename T>
struct RankedList : FormulaDefaults {
    static constexpr Accumulator kNeg = Accumulator::kSum, kPos = Accumulator::kSum;
    static constexpr bool kOnlyNegatives = true;
    static constexpr bool kHinge = true;
    static constexpr bool kNeedsNeg = true;
    static constexpr const char* kParams = "level, temperature, floor";

    T level, temperature, floor;

    DML_INLINE explicit RankedList(Params<T> params)
        : level(T(params[0])), temperature(T(params[1])), floor(T(params[2])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        const S x = s - level;
        return x > T(0) ? exp_fast(temperature * x) : S(0);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return neg_term(s) * (s - level);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return g.pos / (g.neg + floor);
    }
};

}  // namespace dml
