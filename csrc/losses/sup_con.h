#pragma once

#include "losses/formula.h"

namespace dml {

// Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2: the mean over a row's positives
// of log(sum over all its pairs of exp(s / t)) - s_p / t. Rows without positives have no loss.
template <typename T>
struct SupCon : FormulaDefaults {
    static constexpr Accumulator kPos = Accumulator::kSum;
    static constexpr bool kPosInNeg = true;
    static constexpr bool kNeedsPos = true;
    static constexpr const char* kParams = "temperature";

    T inverse;

    DML_INLINE explicit SupCon(Params<T> params) : inverse(T(1.0 / params[0])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(inverse, s);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return rounded_product(-inverse, s);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        if (!(g.pos_count > T(0))) return {};
        return g.neg + g.pos / g.pos_count;
    }
};

}  // namespace dml
