#pragma once

#include "losses/formula.h"

namespace dml {

// Yu and Tao, "Deep Metric Learning with Tuplet Margin Loss", ICCV 2019, equation 5: for each positive pair, at
// the angle theta, log(1 + sum_N exp(scale (s_n - cos(theta - angle)))) = softplus(lse_neg - scale cos(theta -
// angle)). The margin is the angle in degrees.
template <typename T>
struct TupletMargin : FormulaDefaults {
    static constexpr Accumulator kPos = Accumulator::kSum;
    static constexpr bool kContext = true;
    static constexpr bool kNeedsPos = true;
    static constexpr Count kCount = Count::kPairs;
    static constexpr bool kLogOnePlus = true;
    // Beside nt_xent's, terms that see a context make `accumulate` spill registers for sm_90a.
    static constexpr bool kOnCuda = false;
    static constexpr const char* kParams = "margin, scale";

    static constexpr double kRadians = 0.017453292519943295;  // of a degree

    T scale, cosine, sine;

    DML_INLINE explicit TupletMargin(Params<T> params)
        : scale(T(params[1])), cosine(T(cos(kRadians * params[0]))), sine(T(sin(kRadians * params[0]))) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(scale, s);
    }
    // Without negatives exactly 0. The derivative of root at theta = 0 is taken as 0: see margin_softmax.h.
    template <typename S, typename C>
    DML_INLINE auto pos_term(S s, C ctx) const {
        const S turned = cosine * s + sine * root(relu((T(1) - s) * (T(1) + s)));
        const auto z = ctx - rounded_product(scale, turned);
        return is_empty(ctx) ? decltype(z)(T(0)) : softplus(z);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return {g.pos, g.pos_count};
    }
};

}  // namespace dml
