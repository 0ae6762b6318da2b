#pragma once

#include "law.h"

namespace dml {

// Yi et al., "Deep Metric Learning for Person Re-Identification", ICPR 2014, as Wang et al., CVPR 2019,
// compare it: the row's mean over positives plus its mean over negatives.
// params: alpha, beta, base.
template <typename T>
struct BinomialDeviance : LawDefaults {
    static constexpr Fold kNeg = Fold::kSum, kPos = Fold::kSum;
    static constexpr int kParams = 3;

    T alpha, beta, base;

    DML_INLINE explicit BinomialDeviance(const double* params)
        : alpha(T(params[0])), beta(T(params[1])), base(T(params[2])) {}

    DML_INLINE T neg_term(T s) const { return softplus(beta * (s - base)); }
    DML_INLINE T neg_slope(T s) const { return beta * sigmoid(beta * (s - base)); }
    DML_INLINE T pos_term(T s, T) const { return softplus(-alpha * (s - base)); }
    DML_INLINE T pos_slope(T s, T) const { return -alpha * sigmoid(-alpha * (s - base)); }

    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        RowLoss<T> loss;
        loss.d_pos = g.pos_count > T(0) ? T(1) / g.pos_count : T(0);
        loss.d_neg = g.neg_count > T(0) ? T(1) / g.neg_count : T(0);
        loss.part[0] = g.pos * loss.d_pos + g.neg * loss.d_neg;
        return loss;
    }
};

}  // namespace dml
