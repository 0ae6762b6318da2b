#pragma once

#include "losses/formula.h"

namespace dml {

// log sum exp(s / temperature) over a row's negatives, -inf without any: what losses against negatives of their
// own are made of (InfoNCE). Positives count for nothing.
template <typename T>
struct NegativesLSE : FormulaDefaults {
    static constexpr Accumulator kPos = Accumulator::kSum;
    static constexpr const char* kParams = "temperature";

    T inverse;

    DML_INLINE explicit NegativesLSE(Params<T> params) : inverse(T(1.0 / params[0])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(inverse, s);
    }
    template <typename S>
    DML_INLINE S pos_term(S) const {
        return S(0);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return g.neg;
    }
};

}  // namespace dml
