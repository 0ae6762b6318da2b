#pragma once

#include "law.h"

namespace dml {

// Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006, with hinges as
// they are (not squared) and a margin for positives.
// params: pos_level, neg_level. A positive should be more similar than its level, a negative less. On
// distances the levels are the negated margins.
template <typename T>
struct Contrastive : LawDefaults {
    static constexpr Fold kNeg = Fold::kSum, kPos = Fold::kSum;
    static constexpr bool kHinge = true;
    static constexpr Unit kUnit = Unit::kPair;
    static constexpr int kParts = 2;
    static constexpr int kParams = 2;

    T pos_level, neg_level;

    DML_INLINE explicit Contrastive(const double* params)
        : pos_level(T(params[0])), neg_level(T(params[1])) {}

    DML_INLINE T neg_term(T s) const { return relu(s - neg_level); }
    DML_INLINE T neg_slope(T s) const { return s > neg_level ? T(1) : T(0); }
    DML_INLINE T pos_term(T s, T) const { return relu(pos_level - s); }
    DML_INLINE T pos_slope(T s, T) const { return s < pos_level ? T(-1) : T(0); }

    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        return {{g.pos, g.neg}, T(1), T(1), {g.pos_count, g.neg_count}};
    }
};

}  // namespace dml
