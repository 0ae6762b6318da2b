#pragma once

#include "losses/formula.h"

namespace dml {

// Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 9: the
// generalised form of Oh Song et al.'s lifted structure. An empty sum adds nothing.
template <typename T>
struct LiftedStructure : FormulaDefaults {
    static constexpr const char* kParams = "neg_level, pos_level";

    T neg_level, pos_level;

    DML_INLINE explicit LiftedStructure(Params<T> params)
        : neg_level(T(params[0])), pos_level(T(params[1])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return s - neg_level;
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return pos_level - s;
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return relu((is_empty(g.pos) ? S(0) : g.pos) + (is_empty(g.neg) ? S(0) : g.neg));
    }
};

}  // namespace dml
