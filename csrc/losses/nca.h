#pragma once

#include "losses/formula.h"

namespace dml {

// Goldberger et al., "Neighbourhood Components Analysis", NeurIPS 2004: a row draws a neighbour by a softmax
// over its pairs; -log of the probability that it is a positive is softplus(lse_neg - lse_pos). The logit is
// softmax_scale s; a negative softmax_scale, that of distances, multiplies their squares, as in the paper. There
// s <= 0, and the logit rises with s as it does without the square.
template <typename T>
struct NCA : FormulaDefaults {
    static constexpr bool kNeedsPos = true;
    static constexpr Count kCount = Count::kRowsWithLoss;
    static constexpr bool kLogOnePlus = true;
    static constexpr const char* kParams = "softmax_scale";

    T linear, square;

    DML_INLINE explicit NCA(Params<T> params) : linear(relu(T(params[0]))), square(-relu(T(-params[0]))) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(s, linear + square * s);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return neg_term(s);
    }
    // Without negatives exactly 0.
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return is_empty(g.neg) ? S(0) : softplus(g.neg - g.pos);
    }
};

}  // namespace dml
