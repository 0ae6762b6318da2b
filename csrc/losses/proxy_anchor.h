#pragma once

#include "losses/formula.h"

namespace dml {

// Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, equation 4. The rows are the proxies
// of the classes, the columns the embeddings: log(1 + sum_P exp(-alpha (s - margin))), averaged over the
// proxies that have positives, plus log(1 + sum_N exp(alpha (s + margin))), averaged over all.
template <typename T>
struct ProxyAnchor : FormulaDefaults {
    static constexpr int kParts = 2;
    static constexpr bool kLogOnePlus = true;
    static constexpr const char* kParams = "margin, alpha";

    T margin, alpha;

    DML_INLINE explicit ProxyAnchor(Params<T> params) : margin(T(params[0])), alpha(T(params[1])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(alpha, s + margin);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return rounded_product(-alpha, s - margin);
    }
    // The 1 of log(1 + sum) joins here, so that an accumulator without pairs stays recognisable.
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        const bool any_pos = !is_empty(g.pos), any_neg = !is_empty(g.neg);
        return {any_pos ? softplus(g.pos) : S(0), Plain<S>(any_pos), any_neg ? softplus(g.neg) : S(0),
                Plain<S>(1)};
    }
};

}  // namespace dml
