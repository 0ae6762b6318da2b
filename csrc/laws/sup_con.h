#pragma once

#include "law.h"

namespace dml {

// Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2: the mean over a row's positives
// of log(sum over all its pairs of exp(s / t)) - s_p / t. Rows without positives have no loss.
// params: temperature.
template <typename T>
struct SupCon : LawDefaults {
    static constexpr Fold kPos = Fold::kSum;
    static constexpr bool kPosInNeg = true;
    static constexpr bool kNeedsPos = true;
    static constexpr int kParams = 1;

    T inverse;

    DML_INLINE explicit SupCon(const double* params) : inverse(T(1.0 / params[0])) {}

    DML_INLINE T neg_term(T s) const { return rounded_product(inverse, s); }
    DML_INLINE T neg_slope(T) const { return inverse; }
    DML_INLINE T pos_term(T s, T) const { return rounded_product(-inverse, s); }
    DML_INLINE T pos_slope(T, T) const { return -inverse; }

    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        RowLoss<T> loss;
        if (!(g.pos_count > T(0))) return loss;
        loss.part[0] = g.neg + g.pos / g.pos_count;
        loss.d_neg = T(1);
        loss.d_pos = T(1) / g.pos_count;
        return loss;
    }
};

}  // namespace dml
