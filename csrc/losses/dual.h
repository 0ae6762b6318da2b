// Dual numbers: a value and its derivative. A formula called with (s, 1) returns its value and its derivative
// at s. Compilers remove derivatives that nothing uses.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/numeric.h"
#include "core/portable.h"

namespace dml {

template <typename T>
struct Dual {
    T value, derivative;

    DML_INLINE Dual(T value = T(0), T derivative = T(0)) : value(value), derivative(derivative) {}
    template <typename U>
    DML_INLINE explicit Dual(Dual<U> x) : value(T(x.value)), derivative(T(x.derivative)) {}

    friend DML_INLINE Dual operator-(Dual a) { return {-a.value, -a.derivative}; }
    friend DML_INLINE Dual operator+(Dual a, Dual b) {
        return {a.value + b.value, a.derivative + b.derivative};
    }
    friend DML_INLINE Dual operator-(Dual a, Dual b) {
        return {a.value - b.value, a.derivative - b.derivative};
    }
    friend DML_INLINE Dual operator*(Dual a, Dual b) {
        return {a.value * b.value, a.derivative * b.value + a.value * b.derivative};
    }
    friend DML_INLINE Dual operator/(Dual a, Dual b) {
        const T ratio = a.value / b.value;
        return {ratio, (a.derivative - ratio * b.derivative) / b.value};
    }

    // With a constant: a compiler may not drop its derivative of 0 by itself, as 0 * inf is not 0.
    friend DML_INLINE Dual operator+(Dual a, T b) { return {a.value + b, a.derivative}; }
    friend DML_INLINE Dual operator+(T a, Dual b) { return {a + b.value, b.derivative}; }
    friend DML_INLINE Dual operator-(Dual a, T b) { return {a.value - b, a.derivative}; }
    friend DML_INLINE Dual operator-(T a, Dual b) { return {a - b.value, -b.derivative}; }
    friend DML_INLINE Dual operator*(Dual a, T b) { return {a.value * b, a.derivative * b}; }
    friend DML_INLINE Dual operator*(T a, Dual b) { return {a * b.value, a * b.derivative}; }
    friend DML_INLINE Dual operator/(Dual a, T b) { return {a.value / b, a.derivative / b}; }
    friend DML_INLINE Dual operator/(T a, Dual b) { return Dual(a) / b; }

    friend DML_INLINE Dual pow(Dual x, T power) {
        const T slope = power == T(0) ? T(0) : power * dml::pow(x.value, power - T(1));
        return {dml::pow(x.value, power), slope * x.derivative};
    }
    friend DML_INLINE Dual pow(T x, Dual power) {
        const T y = dml::pow(x, power.value);
        return {y, x > T(0) ? y * dml::log(x) * power.derivative : T(0)};
    }
    friend DML_INLINE Dual pow(Dual x, Dual power) {
        const Dual of_x = pow(x, power.value), of_power = pow(x.value, power);
        return {of_x.value, of_x.derivative + of_power.derivative};
    }

    friend DML_INLINE bool operator<(Dual a, Dual b) { return a.value < b.value; }
    friend DML_INLINE bool operator>(Dual a, Dual b) { return a.value > b.value; }
    friend DML_INLINE bool operator<=(Dual a, Dual b) { return a.value <= b.value; }
    friend DML_INLINE bool operator>=(Dual a, Dual b) { return a.value >= b.value; }
    friend DML_INLINE bool operator==(Dual a, Dual b) { return a.value == b.value; }
    friend DML_INLINE bool operator!=(Dual a, Dual b) { return a.value != b.value; }
};

// Plain<T> and Plain<Dual<T>> are T.
template <typename S>
struct PlainOf {
    using Type = S;
};
template <typename T>
struct PlainOf<Dual<T>> {
    using Type = T;
};
template <typename S>
using Plain = typename PlainOf<S>::Type;

template <typename T>
DML_INLINE T derivative_of(T) {
    return T(0);
}
template <typename T>
DML_INLINE T derivative_of(Dual<T> x) {
    return x.derivative;
}

// x, as a constant for the gradient.
template <typename T>
DML_INLINE T constant(T x) {
    return x;
}
template <typename T>
DML_INLINE T constant(Dual<T> x) {
    return x.value;
}

// x, with `share` of its derivative: 1 as x, 0 as constant(x).
template <typename T>
DML_INLINE T with_share_of_derivative(T x, T) {
    return x;
}
template <typename T>
DML_INLINE Dual<T> with_share_of_derivative(Dual<T> x, T share) {
    return {x.value, share * x.derivative};
}

// Whether x is the value of a log-sum-exp over no pair.
template <typename S>
DML_INLINE bool is_empty(S x) {
    return constant(x) == -std::numeric_limits<Plain<S>>::infinity();
}

// ---- the functions of numeric.h ---------------------------------------------------------------------------

template <typename T>
DML_INLINE Dual<T> rounded_product(Dual<T> a, Dual<T> b) {
    return {rounded_product(a.value, b.value), a.derivative * b.value + a.value * b.derivative};
}
template <typename T>
DML_INLINE Dual<T> rounded_product(T a, Dual<T> b) {
    return {rounded_product(a, b.value), a * b.derivative};
}
template <typename T>
DML_INLINE Dual<T> rounded_product(Dual<T> a, T b) {
    return {rounded_product(a.value, b), a.derivative * b};
}

template <typename T>
DML_INLINE Dual<T> exp_fast(Dual<T> x) {
    const T e = exp_fast(x.value);
    return {e, e * x.derivative};
}

template <typename T>
DML_INLINE Dual<T> log(Dual<T> x) {
    return {log(x.value), x.derivative / x.value};
}

// The derivative at 0 is 0.
template <typename T>
DML_INLINE Dual<T> abs(Dual<T> x) {
    const T sign = x.value > T(0) ? T(1) : x.value < T(0) ? T(-1) : T(0);
    return {abs(x.value), sign * x.derivative};
}

template <typename T>
DML_INLINE Dual<T> relu(Dual<T> x) {
    return {relu(x.value), x.value > T(0) ? x.derivative : T(0)};
}

template <typename T>
DML_INLINE Dual<T> sigmoid(Dual<T> x) {
    const T y = sigmoid(x.value);
    return {y, y * (T(1) - y) * x.derivative};
}

template <typename T>
DML_INLINE Dual<T> softplus(Dual<T> x) {
    return {softplus(x.value), sigmoid(x.value) * x.derivative};
}

template <typename T>
DML_INLINE Dual<T> cos(Dual<T> x) {
    return {cos(x.value), -sin(x.value) * x.derivative};
}
template <typename T>
DML_INLINE Dual<T> sin(Dual<T> x) {
    return {sin(x.value), cos(x.value) * x.derivative};
}

// The angle whose sine and cosine are in the ratio y : x.
template <typename T>
DML_INLINE Dual<T> angle(Dual<T> y, Dual<T> x) {
    const T square = x.value * x.value + y.value * y.value;
    return {angle(y.value, x.value), (x.value * y.derivative - y.value * x.derivative) / square};
}

template <typename T>
DML_INLINE Dual<T> root(Dual<T> x) {
    const T y = root(x.value);
    return {y, x.value > T(0) ? x.derivative / (T(2) * y) : T(0)};
}

}  // namespace dml
