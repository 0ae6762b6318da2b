#pragma once

#include "losses/formula.h"

namespace dml {

// Softmax over classes with a margin for the row's class: softplus(lse_neg - scale psi(s_pos)) with
//   psi(cos theta) = cos(theta + angle) - margin                    for theta <= pi - angle
//                    cos(theta) - angle sin(angle) - margin         beyond, where it keeps falling
// Normalised softmax (Zhai & Wu, BMVC 2019) and ProxyNCA (Movshovitz-Attias et al., ICCV 2017) have neither
// margin nor angle, CosFace (Wang et al., CVPR 2018) has the margin, ArcFace (Deng et al., CVPR 2019) the
// angle. The parameters are cos(angle) and sin(angle), with the angle in [0, pi].
template <typename T>
struct MarginSoftmax : FormulaDefaults {
    static constexpr bool kNeedsPos = true, kNeedsNeg = true;
    static constexpr bool kLogOnePlus = true;
    static constexpr const char* kParams = "scale, margin, cosine, sine";

    T scale, margin, cosine, sine, shift;

    DML_INLINE explicit MarginSoftmax(Params<T> params)
        : scale(T(params[0])),
          margin(T(params[1])),
          cosine(T(params[2])),
          sine(T(params[3])),
          shift(sine * angle(sine, cosine)) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(scale, s);
    }
    // At theta = 0 the derivative of psi is infinite, but the gradient multiplies it with the part of the
    // class weight orthogonal to the row, which is 0. root takes its derivative as 0 there, which gives that
    // 0.
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        const S sine_of_s = root(relu((T(1) - s) * (T(1) + s)));
        const S turned = s >= -cosine ? cosine * s - sine * sine_of_s : s - shift;
        return rounded_product(-scale, turned - margin);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return softplus(g.pos + g.neg);
    }
};

}  // namespace dml
