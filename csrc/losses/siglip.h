#pragma once

#include "losses/formula.h"

namespace dml {

// Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023: -log sigmoid(z (scale s + bias)) of
// every pair, z = 1 for positives and -1 for negatives.
template <typename T>
struct SigLIP : FormulaDefaults {
    static constexpr Accumulator kNeg = Accumulator::kSum, kPos = Accumulator::kSum;
    static constexpr const char* kParams = "scale, bias";

    T scale, bias;

    DML_INLINE explicit SigLIP(Params<T> params) : scale(T(params[0])), bias(T(params[1])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return softplus(scale * s + bias);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return softplus(-(scale * s + bias));
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return g.pos + g.neg;
    }
};

}  // namespace dml
