#pragma once

#include "losses/formula.h"

namespace dml {

// Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006, with hinges that
// are not squared and a margin for positives. A positive should be more similar than pos_level, a negative
// less than neg_level. On distances the levels are the negated margins.
template <typename T>
struct Contrastive : FormulaDefaults {
    static constexpr Accumulator kNeg = Accumulator::kSum, kPos = Accumulator::kSum;
    static constexpr bool kHinge = true;
    static constexpr Count kCount = Count::kPairs;
    static constexpr int kParts = 2;
    static constexpr const char* kParams = "pos_level, neg_level";

    T pos_level, neg_level;

    DML_INLINE explicit Contrastive(Params<T> params) : pos_level(T(params[0])), neg_level(T(params[1])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return relu(s - neg_level);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return relu(pos_level - s);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return {g.pos, g.pos_count, g.neg, g.neg_count};
    }
};

}  // namespace dml
