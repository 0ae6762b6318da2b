#pragma once

#include "law.h"

namespace dml {

// Softmax over classes with a margin for the row's own: the loss is softplus(lse_neg - scale psi(s_pos)) with
//   psi(cos theta) = cos(theta + angle) - margin,
// beyond theta = pi - angle cos theta - angle sin(angle) - margin, so that it goes on falling. Normalised
// softmax (Zhai & Wu, BMVC 2019) and ProxyNCA (Movshovitz-Attias et al., ICCV 2017) have neither margin,
// CosFace (Wang et al., CVPR 2018) the margin, ArcFace (Deng et al., CVPR 2019) the angle.
// params: scale, margin, cos(angle), sin(angle), with the angle in [0, pi].
template <typename T>
struct MarginSoftmax : LawDefaults {
    static constexpr bool kNeedsPos = true, kNeedsNeg = true;  // a row of no class, or of the only one, has 0
    static constexpr int kParams = 4;

    T scale, margin, cosine, sine, shift;

    DML_INLINE explicit MarginSoftmax(const double* params)
        : scale(T(params[0])),
          margin(T(params[1])),
          cosine(T(params[2])),
          sine(T(params[3])),
          shift(sine * std::atan2(sine, cosine)) {}

    DML_INLINE T neg_term(T s) const { return rounded_product(scale, s); }
    DML_INLINE T neg_slope(T) const { return scale; }
    DML_INLINE T pos_term(T s, T) const {
        const T turned = s >= -cosine ? cosine * s - sine * std::sqrt(sine_squared(s)) : s - shift;
        return rounded_product(-scale, turned - margin);
    }
    // At theta = 0 the slope is infinite, but what it is multiplied with, the part of the class's weight
    // across the row, is 0: there it counts as 0.
    DML_INLINE T pos_slope(T s, T) const {
        const T square = sine_squared(s);
        const T across = square > T(0) ? s / std::sqrt(square) : T(0);
        return -scale * (s >= -cosine ? cosine + sine * across : T(1));
    }

    DML_INLINE RowLoss<T> row(const Gathered<T>& g) const {
        RowLoss<T> loss;
        if (g.pos == -infinity<T>() || g.neg == -infinity<T>()) return loss;
        loss.part[0] = softplus(g.pos + g.neg);
        loss.d_pos = loss.d_neg = sigmoid(g.pos + g.neg);
        return loss;
    }

   private:
    static DML_INLINE T sine_squared(T s) { return relu((T(1) - s) * (T(1) + s)); }
};

}  // namespace dml
