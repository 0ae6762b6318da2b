#pragma once

#include "law.h"

namespace dml {

// Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 9: the
// generalised form of Oh Song et al.'s lifted structure, one logit a pair. An empty sum adds nothing.
// params: neg_level, pos_level. On distances the levels are the negated margins.
template <typename T>
struct LiftedStructure : LawDefaults {
    static constexpr int kParams = 2;

    T neg_level, pos_level;

    DML_INLINE explicit LiftedStructure(const double* params)
        : neg_level(T(params[0])), pos_level(T(params[1])) {}

    DML_INLINE T neg_term(T s) const { return s - neg_level; }
    DML_INLINE T neg_slope(T) const { return T(1); }
    DML_INLINE T pos_term(T s, T) const { return pos_level - s; }
    DML_INLINE T pos_slope(T, T) const { return T(-1); }

    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        RowLoss<T> loss;
        const T pos = g.pos == -infinity<T>() ? T(0) : g.pos;
        const T neg = g.neg == -infinity<T>() ? T(0) : g.neg;
        loss.part[0] = relu(pos + neg);
        loss.d_pos = loss.d_neg = pos + neg > T(0) ? T(1) : T(0);
        return loss;
    }
};

}  // namespace dml
