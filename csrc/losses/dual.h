// Dual numbers: a value and its derivative. A formula called with (s, 1) returns its value and its derivative
// at s. Compilers remove derivatives that nothing uses.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/numeric.h"
#include "core/portable.h"

namespace dml {

// Several derivatives of one value, one for each of N variables. Members instead of an array: compilers keep
// them in registers.
template <typename T, int N>
struct Lanes {
    T first = T(0);
    Lanes<T, N - 1> rest;

    Lanes() = default;
    DML_INLINE Lanes(T first, Lanes<T, N - 1> rest) : first(first), rest(rest) {}
    template <typename U>
    DML_INLINE explicit Lanes(Lanes<U, N> x) : first(T(x.first)), rest(x.rest) {}

    // 1 for variable k, 0 for the others.
    static DML_INLINE Lanes unit(int k) { return {T(k == 0), Lanes<T, N - 1>::unit(k - 1)}; }

    friend DML_INLINE Lanes operator-(Lanes a) { return {-a.first, -a.rest}; }
    friend DML_INLINE Lanes operator+(Lanes a, Lanes b) { return {a.first + b.first, a.rest + b.rest}; }
    friend DML_INLINE Lanes operator-(Lanes a, Lanes b) { return {a.first - b.first, a.rest - b.rest}; }
    friend DML_INLINE Lanes operator*(Lanes a, T b) { return {a.first * b, a.rest * b}; }
    friend DML_INLINE Lanes operator*(T a, Lanes b) { return {a * b.first, a * b.rest}; }
    friend DML_INLINE Lanes operator/(Lanes a, T b) { return {a.first / b, a.rest / b}; }
};
template <typename T>
struct Lanes<T, 0> {
    Lanes() = default;
    template <typename U>
    DML_INLINE explicit Lanes(Lanes<U, 0>) {}

    static DML_INLINE Lanes unit(int) { return {}; }

    friend DML_INLINE Lanes operator-(Lanes) { return {}; }
    friend DML_INLINE Lanes operator+(Lanes, Lanes) { return {}; }
    friend DML_INLINE Lanes operator-(Lanes, Lanes) { return {}; }
    friend DML_INLINE Lanes operator*(Lanes, T) { return {}; }
    friend DML_INLINE Lanes operator*(T, Lanes) { return {}; }
    friend DML_INLINE Lanes operator/(Lanes, T) { return {}; }
};

// A derivative where a condition holds, else 0.
template <typename T>
DML_INLINE T where(bool condition, T derivative) {
    return condition ? derivative : T(0);
}
template <typename T, int N>
DML_INLINE Lanes<T, N> where(bool condition, Lanes<T, N> derivative) {
    if constexpr (N == 0) {
        return {};
    } else {
        return {where(condition, derivative.first), where(condition, derivative.rest)};
    }
}

// D: T, or Lanes of T.
template <typename T, typename D = T>
struct Dual {
    T value;
    D derivative;

    DML_INLINE Dual(T value = T(0), D derivative = D{}) : value(value), derivative(derivative) {}
    template <typename U, typename E>
    DML_INLINE explicit Dual(Dual<U, E> x) : value(T(x.value)), derivative(D(x.derivative)) {}

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
        return {y, where(x > T(0), y * dml::log(x) * power.derivative)};
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

// Plain<T> and Plain<Dual<T, D>> are T.
template <typename S>
struct PlainOf {
    using Type = S;
};
template <typename T, typename D>
struct PlainOf<Dual<T, D>> {
    using Type = T;
};
template <typename S>
using Plain = typename PlainOf<S>::Type;

template <typename T>
DML_INLINE T derivative_of(T) {
    return T(0);
}
template <typename T, typename D>
DML_INLINE D derivative_of(Dual<T, D> x) {
    return x.derivative;
}

// x, as a constant for the gradient.
template <typename T>
DML_INLINE T constant(T x) {
    return x;
}
template <typename T, typename D>
DML_INLINE T constant(Dual<T, D> x) {
    return x.value;
}

// x, with `share` of its derivative: 1 as x, 0 as constant(x).
template <typename T>
DML_INLINE T with_share_of_derivative(T x, T) {
    return x;
}
template <typename T, typename D>
DML_INLINE Dual<T, D> with_share_of_derivative(Dual<T, D> x, T share) {
    return {x.value, share * x.derivative};
}
template <typename T, typename D>
DML_INLINE Dual<T, D> with_share_of_derivative(Dual<T, D> x, Dual<T, D> share) {
    return {x.value, share.value * x.derivative};
}

// Whether x is the value of a log-sum-exp over no pair.
template <typename S>
DML_INLINE bool is_empty(S x) {
    return constant(x) == -std::numeric_limits<Plain<S>>::infinity();
}

// ---- the functions of numeric.h ---------------------------------------------------------------------------

template <typename T, typename D>
DML_INLINE Dual<T, D> rounded_product(Dual<T, D> a, Dual<T, D> b) {
    return {rounded_product(a.value, b.value), a.derivative * b.value + a.value * b.derivative};
}
template <typename T, typename D>
DML_INLINE Dual<T, D> rounded_product(T a, Dual<T, D> b) {
    return {rounded_product(a, b.value), a * b.derivative};
}
template <typename T, typename D>
DML_INLINE Dual<T, D> rounded_product(Dual<T, D> a, T b) {
    return {rounded_product(a.value, b), a.derivative * b};
}

template <typename T, typename D>
DML_INLINE Dual<T, D> exp_fast(Dual<T, D> x) {
    const T e = exp_fast(x.value);
    return {e, e * x.derivative};
}

template <typename T, typename D>
DML_INLINE Dual<T, D> log(Dual<T, D> x) {
    return {log(x.value), x.derivative / x.value};
}

// The derivative at 0 is 0.
template <typename T, typename D>
DML_INLINE Dual<T, D> abs(Dual<T, D> x) {
    const T sign = x.value > T(0) ? T(1) : x.value < T(0) ? T(-1) : T(0);
    return {abs(x.value), sign * x.derivative};
}

template <typename T, typename D>
DML_INLINE Dual<T, D> relu(Dual<T, D> x) {
    return {relu(x.value), where(x.value > T(0), x.derivative)};
}

template <typename T, typename D>
DML_INLINE Dual<T, D> sigmoid(Dual<T, D> x) {
    const T y = sigmoid(x.value);
    return {y, y * (T(1) - y) * x.derivative};
}

template <typename T, typename D>
DML_INLINE Dual<T, D> softplus(Dual<T, D> x) {
    return {softplus(x.value), sigmoid(x.value) * x.derivative};
}

template <typename T, typename D>
DML_INLINE Dual<T, D> cos(Dual<T, D> x) {
    return {cos(x.value), -sin(x.value) * x.derivative};
}
template <typename T, typename D>
DML_INLINE Dual<T, D> sin(Dual<T, D> x) {
    return {sin(x.value), cos(x.value) * x.derivative};
}

// The angle whose sine and cosine are in the ratio y : x.
template <typename T, typename D>
DML_INLINE Dual<T, D> angle(Dual<T, D> y, Dual<T, D> x) {
    const T square = x.value * x.value + y.value * y.value;
    return {angle(y.value, x.value), (x.value * y.derivative - y.value * x.derivative) / square};
}

template <typename T, typename D>
DML_INLINE Dual<T, D> root(Dual<T, D> x) {
    const T y = root(x.value);
    return {y, where(x.value > T(0), x.derivative / (T(2) * y))};
}

}  // namespace dml
