#pragma once

#include "losses/formula.h"

namespace dml {

// Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NeurIPS 2016; van den Oord et
// al., "Representation Learning with Contrastive Predictive Coding", 2018; Chen et al., "A Simple Framework
// for Contrastive Learning of Visual Representations", ICML 2020:
// for each positive pair
//   -log(exp(s_p / t) / (exp(s_p / t) + sum_N exp(s_n / t))) = softplus(lse_neg - s_p / t).
template <typename T>
struct NTXent : FormulaDefaults {
    static constexpr Accumulator kPos = Accumulator::kSum;
    static constexpr bool kContext = true;
    static constexpr bool kNeedsPos = true;
    static constexpr Count kCount = Count::kPairs;
    static constexpr bool kLogOnePlus = true;
    static constexpr const char* kParams = "temperature";

    T inverse;

    DML_INLINE explicit NTXent(Params<T> params) : inverse(T(1.0 / params[0])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(inverse, s);
    }
    // Without negatives exactly 0.
    template <typename S, typename C>
    DML_INLINE auto pos_term(S s, C ctx) const {
        const auto z = ctx - rounded_product(inverse, s);
        return is_empty(ctx) ? decltype(z)(T(0)) : softplus(z);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return {g.pos, g.pos_count};
    }
};

}  // namespace dml
