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

    DML_INLINE explicit Circle(const double* params)
        : m(T(params[0])), gamma(T(params[1])), moving(params[2] != 0.0 ? T(0) : T(1)) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(gamma * weight(s + m), s - m);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return rounded_product(-gamma * weight(T(1) + m - s), s - (T(1) - m));
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return softplus(g.pos + g.neg);
    }

   private:
    // Held constant in the gradient, as the paper does, where detach_weights is not 0.
    template <typename S>
    DML_INLINE S weight(S distance) const {
        return with_share_of_derivative(relu(distance), moving);
    }
};

}  // namespace dml
