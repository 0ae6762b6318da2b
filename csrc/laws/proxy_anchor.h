#pragma once

#include "law.h"

namespace dml {

// Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, equation 4. The rows are the proxies
// of the classes, the columns the embeddings: log(1 + sum_P exp(-alpha (s - margin))), averaged over the
// proxies that have positives, plus log(1 + sum_N exp(alpha (s + margin))), averaged over all. params:
// margin, alpha.
template <typename T>
struct ProxyAnchor : LawDefaults {
    static constexpr int kParts = 2;
    static constexpr int kParams = 2;

    T margin, alpha;

    DML_INLINE explicit ProxyAnchor(const double* params) : margin(T(params[0])), alpha(T(params[1])) {}

    DML_INLINE T neg_term(T s) const { return rounded_product(alpha, s + margin); }
    DML_INLINE T neg_slope(T) const { return alpha; }
    DML_INLINE T pos_term(T s, T) const { return rounded_product(-alpha, s - margin); }
    DML_INLINE T pos_slope(T, T) const { return -alpha; }

    // The 1 of log(1 + sum) joins here and not in the folds, which so tell whether there was a pair.
    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        const bool some_pos = g.pos != -infinity<T>(), some_neg = g.neg != -infinity<T>();
        RowLoss<T> loss;
        loss.part[0] = some_pos ? softplus(g.pos) : T(0);
        loss.part[1] = some_neg ? softplus(g.neg) : T(0);
        loss.d_pos = some_pos ? sigmoid(g.pos) : T(0);
        loss.d_neg = some_neg ? sigmoid(g.neg) : T(0);
        loss.unit[0] = some_pos ? T(1) : T(0);
        return loss;
    }
};

}  // namespace dml
