#pragma once

#include "law.h"

namespace dml {

// Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NeurIPS 2016; van den Oord et
// al., "Representation Learning with Contrastive Predictive Coding", 2018; Chen et al., "A Simple Framework
// for Contrastive Learning of Visual Representations", ICML 2020:
// for each positive pair -log(exp(s_p / t) / (exp(s_p / t) + sum_N exp(s_n / t))) = softplus(lse_neg - s_p /
// t). params: temperature.
template <typename T>
struct NTXent : LawDefaults {
    static constexpr Fold kPos = Fold::kSum;
    static constexpr bool kContext = true;
    static constexpr bool kNeedsPos = true;
    static constexpr Unit kUnit = Unit::kPair;
    static constexpr int kParams = 1;

    T inverse;

    DML_INLINE explicit NTXent(const double* params) : inverse(T(1.0 / params[0])) {}

    DML_INLINE T neg_term(T s) const { return rounded_product(inverse, s); }
    DML_INLINE T neg_slope(T) const { return inverse; }
    // Without negatives ctx is -inf, and all of these are exactly 0.
    DML_INLINE T pos_term(T s, T ctx) const {
        return ctx == -infinity<T>() ? T(0) : softplus(ctx - rounded_product(inverse, s));
    }
    DML_INLINE T pos_slope(T s, T ctx) const { return -inverse * pos_context(s, ctx); }
    DML_INLINE T pos_context(T s, T ctx) const {
        return ctx == -infinity<T>() ? T(0) : sigmoid(ctx - rounded_product(inverse, s));
    }

    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        RowLoss<T> loss;
        loss.part[0] = g.pos;
        loss.d_pos = T(1);
        loss.d_neg = g.pos_context;
        loss.unit[0] = g.pos_count;
        return loss;
    }
};

}  // namespace dml
