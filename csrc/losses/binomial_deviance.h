#pragma once

#include "losses/formula.h"

namespace dml {

// Yi et al., "Deep Metric Learning for Person Re-Identification", ICPR 2014, as Wang et al., CVPR 2019,
// compare it: the row's mean over positives plus its mean over negatives.
template <typename T>
struct BinomialDeviance : FormulaDefaults {
    static constexpr Accumulator kNeg = Accumulator::kSum, kPos = Accumulator::kSum;
    static constexpr const char* kParams = "alpha, beta, base";

    T alpha, beta, base;

    DML_INLINE explicit BinomialDeviance(Params<T> params)
        : alpha(T(params[0])), beta(T(params[1])), base(T(params[2])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return softplus(beta * (s - base));
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return softplus(-alpha * (s - base));
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return mean(g.pos, g.pos_count) + mean(g.neg, g.neg_count);
    }

   private:
    template <typename S>
    static DML_INLINE S mean(S sum, T count) {
        return sum * (count > T(0) ? T(1) / count : T(0));
    }
};

}  // namespace dml
