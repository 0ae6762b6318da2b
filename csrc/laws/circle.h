#pragma once

#include "law.h"

namespace dml {

// Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020,
// equations 4 to 8 with O_p = 1 + m, O_n = -m, Delta_p = 1 - m, Delta_n = m.
// params: m, gamma, detach_weights (0 or 1).
template <typename T>
struct Circle : LawDefaults {
    static constexpr bool kNeedsPos = true, kNeedsNeg = true;  // softplus(lse_pos + lse_neg) needs both
    static constexpr int kParams = 3;

    T m, gamma;
    T slope_scale, slope_shift;

    // The paper holds the weights relu(..) constant: then d neg_term / ds = gamma (s + m) where the relu
    // is open. Without that the product rule makes it gamma 2 s. Likewise, with 1 - s for s, for
    // positives. Both are gamma (slope_scale s + slope_shift), so that no loop branches on it.
    DML_INLINE explicit Circle(const double* params)
        : m(T(params[0])),
          gamma(T(params[1])),
          slope_scale(params[2] != 0.0 ? T(1) : T(2)),
          slope_shift(params[2] != 0.0 ? m : T(0)) {}

    DML_INLINE T neg_term(T s) const { return rounded_product(gamma * relu(s + m), s - m); }
    DML_INLINE T neg_slope(T s) const {
        return s + m > T(0) ? gamma * (slope_scale * s + slope_shift) : T(0);
    }
    DML_INLINE T pos_term(T s, T) const {
        return rounded_product(-gamma * relu(T(1) + m - s), s - (T(1) - m));
    }
    DML_INLINE T pos_slope(T s, T) const {
        return T(1) + m - s > T(0) ? -gamma * (slope_scale * (T(1) - s) + slope_shift) : T(0);
    }

    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        RowLoss<T> loss;
        if (g.pos == -infinity<T>() || g.neg == -infinity<T>()) return loss;
        loss.part[0] = softplus(g.pos + g.neg);
        loss.d_pos = loss.d_neg = sigmoid(g.pos + g.neg);
        return loss;
    }
};

}  // namespace dml
