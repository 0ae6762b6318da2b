// The functions of formulas. On the host they are plain arithmetic, so that compilers vectorise loops over
// them for any instruction set. exp_fast is accurate to about 1 ulp on [-87, 88] (float) and [-708, 709]
// (double); other arguments are clamped, and no log-sum-exp sees the difference.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/portable.h"

namespace dml {

template <typename T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
    using Bits = int32_t;
    static constexpr float kLow = -87.0f, kHigh = 88.0f;
    static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float kLog2e = 1.44269504f;
    static constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
    static constexpr int kMantissa = 23, kTerms = 7;
};

template <>
struct ExpTraits<double> {
    using Bits = int64_t;
    static constexpr double kLow = -708.0, kHigh = 709.0;
    static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double kLog2e = 1.4426950408889634;
    static constexpr double kLn2High = 0.69314718036912382, kLn2Low = 1.9082149292705877e-10;
    static constexpr int kMantissa = 52, kTerms = 13;
};

template <typename To, typename From>
DML_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where kTerms terms of the Taylor
// series are exact to about the last bit.
template <typename T>
DML_INLINE T exp_fast(T x) {
#if defined(__CUDA_ARCH__)
    return std::exp(x);
#else
    using Traits = ExpTraits<T>;
    using Bits = typename Traits::Bits;
    x = x < Traits::kLow ? Traits::kLow : x;
    x = x > Traits::kHigh ? Traits::kHigh : x;
    const T shifted = x * Traits::kLog2e + Traits::kRound;
    const T n = shifted - Traits::kRound;
    const T r = (x - n * Traits::kLn2High) - n * Traits::kLn2Low;
    T series = T(1);
    DML_UNROLL(16)
    for (int k = Traits::kTerms; k >= 1; --k) series = series * r * T(1.0 / k) + T(1);
    // The low bits of shifted hold n; moved to the exponent field they multiply by 2^n.
    const Bits exponent =
        static_cast<Bits>(static_cast<uint64_t>(bit_cast<Bits>(shifted)) << Traits::kMantissa);
    return bit_cast<T>(static_cast<Bits>(bit_cast<Bits>(series) + exponent));
#endif
}

// log(1 + x) for x in [0, 1]: 2 artanh(x / (2 + x)), with an argument of at most 1/3.
template <typename T>
DML_INLINE T log1p_fast(T x) {
#if defined(__CUDA_ARCH__)
    return std::log1p(x);
#else
    constexpr int kTerms = sizeof(T) == 8 ? 17 : 8;
    const T z = x / (T(2) + x), square = z * z;
    T series = T(1.0 / (2 * kTerms + 1));
    DML_UNROLL(32)
    for (int k = kTerms - 1; k >= 0; --k) series = series * square + T(1.0 / (2 * k + 1));
    return T(2) * z * series;
#endif
}

// log(x) for finite x > 0; subnormal numbers count as the smallest normal one. x = 2^n y with y within a
// factor sqrt(2) of 1, and log(y) = 2 artanh((y - 1) / (y + 1)).
template <typename T>
DML_INLINE T log_fast(T x) {
#if defined(__CUDA_ARCH__)
    return std::log(x);
#else
    using Traits = ExpTraits<T>;
    using Bits = typename Traits::Bits;
    constexpr int kTerms = sizeof(T) == 8 ? 10 : 4;
    constexpr Bits kHalfRoot = sizeof(T) == 8 ? Bits(0x3FE6A09E667F3BCD) : Bits(0x3F3504F3);  // sqrt(1/2)
    constexpr T kSmallest = std::numeric_limits<T>::min();
    x = x < kSmallest ? kSmallest : x;
    const Bits shifted = bit_cast<Bits>(x) - kHalfRoot;
    const Bits exponent = shifted >> Traits::kMantissa;
    const T y = bit_cast<T>(static_cast<Bits>((shifted & ((Bits(1) << Traits::kMantissa) - 1)) + kHalfRoot));
    const T z = (y - T(1)) / (y + T(1)), square = z * z;
    T series = T(1.0 / (2 * kTerms + 1));
    DML_UNROLL(16)
    for (int k = kTerms - 1; k >= 1; --k) series = series * square + T(1.0 / (2 * k + 1));
    const T n = static_cast<T>(exponent);
    return n * Traits::kLn2High + (T(2) * (z + z * square * series) + n * Traits::kLn2Low);
#endif
}

// The logarithm, also of 0 (-inf), of infinity, and of negative numbers (NaN).
template <typename T>
DML_INLINE T log(T x) {
#if defined(__CUDA_ARCH__)
    return std::log(x);
#else
    using Limits = std::numeric_limits<T>;
    const T finite = x > Limits::max() ? x : log_fast(x);
    const T not_positive = x == T(0) ? -Limits::infinity() : Limits::quiet_NaN();
    return x > T(0) ? finite : not_positive;
#endif
}

// Not vectorised: write a product for a small whole power.
template <typename T>
DML_INLINE T pow(T x, std::common_type_t<T> power) {
    return std::pow(x, power);
}

template <typename T>
DML_INLINE T abs(T x) {
    return x < T(0) ? -x : x;
}

template <typename T>
DML_INLINE T relu(T x) {
    return x > T(0) ? x : T(0);
}

// Of a parameter, in a constructor: not vectorised.
template <typename T>
DML_INLINE T cos(T x) {
    return std::cos(x);
}
template <typename T>
DML_INLINE T sin(T x) {
    return std::sin(x);
}

// The angle whose sine and cosine are in the ratio y : x.
template <typename T>
DML_INLINE T angle(T y, T x) {
    return std::atan2(y, x);
}

// The square root, by two names. Dual numbers take its derivative at 0 as 0.
template <typename T>
DML_INLINE T root(T x) {
    return std::sqrt(x);
}
template <typename T>
DML_INLINE T sqrt(T x) {
    return root(x);
}

template <typename T>
DML_INLINE T sigmoid(T x) {
    const T e = exp_fast(x < T(0) ? x : -x);
    const T share = T(1) / (T(1) + e);
    return x < T(0) ? e * share : share;
}

// Below it exp(x) is 0 in this type.
template <typename T>
inline constexpr T kExpUnderflow = sizeof(T) == 8 ? T(-745.13) : T(-103.97);

// log(1 + exp(x)), without overflow for large x and without cancellation for small. 0 exactly where exp(x) is.
template <typename T>
DML_INLINE T softplus(T x) {
    const T below = x < T(0) ? x : -x;
    const T e = exp_fast(below);
    return relu(x) + log1p_fast(below < kExpUnderflow<T> ? T(0) : e);
}

// Whether x = log(1 + y) is 0 where it is computed from 1 + y in this type, as that is 1 for tiny y.
template <typename T>
DML_INLINE bool vanishes(T x) {
    return x <= std::numeric_limits<T>::epsilon() / 2;
}

}  // namespace dml
