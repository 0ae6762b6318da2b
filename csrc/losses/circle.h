#pragma once

#include "losses/formula.h"

namespace dml {

// Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020,
// equations 4 to 8 with O_p = 1 + m, O_n = -m, Delta_p = 1 - m, Delta_n = m.
template <typename T>
struct Circle : FormulaDefaults {
    static constexpr bool kNeedsPos = true, kNeedsNeg = true;  // softplus(lse_pos + lse_neg) needs both
    static constexpr const char* kParams = "m, gamma, detach_weights";

    T m, gamma, moving;

    DML_INLINE explicit Circle(Params<T> params)
        : m(T(params[0])), gamma(T(params[1])), moving(params[2] != 0.0 ? T(0) : T(1)) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(gamma * relu(in_weight(s) + m), s - m);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return rounded_product(-gamma * relu(T(1) + m - in_weight(s)), s - (T(1) - m));
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return softplus(g.pos + g.neg);
    }

   private:
    // The similarity as the weights see it: constant in the gradient, as in the paper, where detach_weights
    // is not 0.
    template <typename S>
    DML_INLINE S in_weight(S s) const {
        return with_share_of_derivative(s, moving);
    }
};

}  // namespace dml
