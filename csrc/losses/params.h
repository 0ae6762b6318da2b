// The parameters of a formula, as its constructor gets them: params[0], params[1], ... in the order of kParams.
#pragma once

#include "core/portable.h"
#include "losses/dual.h"

namespace dml {

inline constexpr int kMaxParams = 8;

template <typename T>
struct Params {
    const double* values;

    DML_INLINE double operator[](int k) const { return values[k]; }
};

// As dual numbers in one of them: a formula made of these has derivatives by that parameter.
template <typename T>
struct Params<Dual<T>> {
    const double* values;
    int learned;

    DML_INLINE Dual<double> operator[](int k) const { return {values[k], k == learned ? 1.0 : 0.0}; }
};

// In all of them: the first of the lanes is the similarity's, then parameter k has the next but k.
template <typename T, int N>
struct Params<Dual<T, Lanes<T, N>>> {
    using Derivatives = Lanes<double, N>;
    const double* values;

    DML_INLINE Dual<double, Derivatives> operator[](int k) const {
        return {values[k], Derivatives::unit(k + 1)};
    }
};

}  // namespace dml
