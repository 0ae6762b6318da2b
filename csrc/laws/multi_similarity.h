#pragma once

#include "law.h"

namespace dml {

// Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, equation 15.
// params: alpha, beta, base.
template <typename T>
struct MultiSimilarity : LawDefaults {
    static constexpr bool kPlusOne = true;  // the 1 in log(1 + sum)
    static constexpr int kParams = 3;

    T alpha, beta, base;

    DML_INLINE explicit MultiSimilarity(const double* params)
        : alpha(T(params[0])), beta(T(params[1])), base(T(params[2])) {}

    DML_INLINE T neg_term(T s) const { return rounded_product(beta, s - base); }
    DML_INLINE T neg_slope(T) const { return beta; }
    DML_INLINE T pos_term(T s, T) const { return rounded_product(-alpha, s - base); }
    DML_INLINE T pos_slope(T, T) const { return -alpha; }

    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        RowLoss<T> loss;
        loss.part[0] = g.pos / alpha + g.neg / beta;
        loss.d_pos = T(1) / alpha;
        loss.d_neg = T(1) / beta;
        return loss;
    }
};

}  // namespace dml
