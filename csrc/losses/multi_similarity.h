#pragma once

#include "losses/formula.h"

namespace dml {

// Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, equation 15.
template <typename T>
struct MultiSimilarity : FormulaDefaults {
    static constexpr bool kPlusOne = true;  // the 1 in log(1 + sum)
    static constexpr const char* kParams = "alpha, beta, base";

    T alpha, beta, base;

    DML_INLINE explicit MultiSimilarity(Params<T> params)
        : alpha(T(params[0])), beta(T(params[1])), base(T(params[2])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(beta, s - base);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return rounded_product(-alpha, s - base);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return g.pos / alpha + g.neg / beta;
    }
};

}  // namespace dml
