// The formulas of the losses, and nothing else: no loop, no tile, no tensor.
//
// The engine knows a loss as a function of two log-sum-exps per row i, over its kept pairs:
//
//   lse_pos = log(kOne + sum_P exp(logit_pos(s_ij)))     kOne is 1 where kCountsOne, else 0
//   lse_neg = log(kOne + sum_N exp(logit_neg(s_ij)))
//   L_i     = loss(lse_pos, lse_neg)
//
// and its gradient as
//
//   dL_i/ds_ij = dloss_dlse(lse_pos, lse_neg).pos * exp(logit_pos(s) - lse_pos) * slope_pos(s)
//
// (likewise for negatives). slope is dlogit/ds as the *gradient* sees it: a loss that holds some of
// its weights constant, as circle loss does, says so there. A new loss of this kind is one struct.
#pragma once

#include <cmath>

#include "portable.h"

namespace dml {

enum class PairLoss : int { kMultiSimilarity = 0, kCircle = 1 };

template <typename T>
struct PosNeg {
    T pos;
    T neg;
};

template <typename T>
DML_INLINE T relu(T x) {
    return x > T(0) ? x : T(0);
}

// log(1 + exp(x)), without overflow for large x and without cancellation for small.
template <typename T>
DML_INLINE T softplus(T x) {
    const T magnitude = x < T(0) ? -x : x;
    return relu(x) + std::log1p(std::exp(-magnitude));
}

template <typename T>
DML_INLINE T sigmoid(T x) {
    return x >= T(0) ? T(1) / (T(1) + std::exp(-x)) : std::exp(x) / (T(1) + std::exp(x));
}

// Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, equation 15.
// params: alpha, beta, base.
template <typename T>
struct MultiSimilarity {
    static constexpr bool kCountsOne = true;   // the 1 in log(1 + sum)
    static constexpr bool kNeedsBoth = false;  // a row with one kind of pair only has a loss
    static constexpr int kParams = 3;

    T alpha, beta, base;

    DML_INLINE explicit MultiSimilarity(const double* params)
        : alpha(T(params[0])), beta(T(params[1])), base(T(params[2])) {}

    DML_INLINE T logit_pos(T s) const { return rounded_product(-alpha, s - base); }
    DML_INLINE T logit_neg(T s) const { return rounded_product(beta, s - base); }
    DML_INLINE T slope_pos(T) const { return -alpha; }
    DML_INLINE T slope_neg(T) const { return beta; }
    DML_INLINE T loss(T lse_pos, T lse_neg) const { return lse_pos / alpha + lse_neg / beta; }
    DML_INLINE PosNeg<T> dloss_dlse(T, T) const { return {T(1) / alpha, T(1) / beta}; }
};

// Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020,
// equations 4 to 8 with O_p = 1 + m, O_n = -m, Delta_p = 1 - m, Delta_n = m.
// params: m, gamma, detach_weights (0 or 1).
template <typename T>
struct Circle {
    static constexpr bool kCountsOne = false;
    static constexpr bool kNeedsBoth = true;  // softplus(lse_pos + lse_neg) needs both
    static constexpr int kParams = 3;

    T m, gamma;
    T slope_scale, slope_shift;

    // The paper holds the weights relu(..) constant: then dlogit_neg/ds = gamma (s + m) where the relu
    // is open. Without that the product rule makes it gamma 2 s. Likewise, with 1 - s for s, for
    // positives. Both are gamma (slope_scale s + slope_shift), so that no loop branches on it.
    DML_INLINE explicit Circle(const double* params)
        : m(T(params[0])),
          gamma(T(params[1])),
          slope_scale(params[2] != 0.0 ? T(1) : T(2)),
          slope_shift(params[2] != 0.0 ? m : T(0)) {}

    DML_INLINE T logit_pos(T s) const { return rounded_product(-gamma * relu(T(1) + m - s), s - (T(1) - m)); }
    DML_INLINE T logit_neg(T s) const { return rounded_product(gamma * relu(s + m), s - m); }

    DML_INLINE T slope_pos(T s) const {
        return T(1) + m - s > T(0) ? -gamma * (slope_scale * (T(1) - s) + slope_shift) : T(0);
    }
    DML_INLINE T slope_neg(T s) const {
        return s + m > T(0) ? gamma * (slope_scale * s + slope_shift) : T(0);
    }
    DML_INLINE T loss(T lse_pos, T lse_neg) const { return softplus(lse_pos + lse_neg); }
    DML_INLINE PosNeg<T> dloss_dlse(T lse_pos, T lse_neg) const {
        const T slope = sigmoid(lse_pos + lse_neg);
        return {slope, slope};
    }
};

}  // namespace dml
