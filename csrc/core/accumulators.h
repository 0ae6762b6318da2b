// What a row gathers over its kept pairs of one kind, and how two partial results merge. Merging in a fixed
// order makes results bitwise repeatable.
//
//   accumulator   running numbers               derivative of the row's loss by a pair's similarity
//   LogSumExp     max, sum of exp(term - max)   c exp(term - value) d term / d s
//   Sum           count, sum of terms           c d term / d s
//
// c is the derivative of the row's loss by the accumulator's value (RowDerivatives in losses/derivatives.h).
#pragma once

#include <cmath>
#include <limits>

#include "core/portable.h"

namespace dml {

enum class Accumulator { kLogSumExp, kSum };

template <typename T>
DML_INLINE T infinity() {
    return std::numeric_limits<T>::infinity();
}

// The largest term so far, and the sum of exp(term - max). An empty one is (-inf, 0).
template <typename T>
struct LogSumExp {
    T max = -infinity<T>();
    T sum = T(0);

    DML_INLINE void merge(T other_max, T other_sum) {
        if (other_max == -infinity<T>()) return;
        if (max >= other_max) {
            sum += other_sum * std::exp(other_max - max);
        } else {
            sum = sum * std::exp(max - other_max) + other_sum;  // exp(-inf) = 0 when still empty
            max = other_max;
        }
    }

    DML_INLINE bool empty() const { return max == -infinity<T>(); }

    // log(sum), or log(1 + sum), accurate for tiny sums too.
    DML_INLINE T value(bool plus_one) const {
        if (empty()) return plus_one ? T(0) : -infinity<T>();
        if (!plus_one) return max + std::log(sum);
        return max > T(0) ? max + std::log(sum + std::exp(-max)) : std::log1p(sum * std::exp(max));
    }
};

// Which pairs of a row are kept. Multi-similarity mining keeps positives with s - epsilon < max_neg and
// negatives with s + epsilon > min_pos; without mining the bounds are infinite.
template <typename T>
struct Bounds {
    T pos_below;  // a positive is kept when s < pos_below
    T neg_above;  // a negative is kept when s > neg_above

    static DML_INLINE Bounds all() { return {infinity<T>(), -infinity<T>()}; }
    static DML_INLINE Bounds none() { return {-infinity<T>(), infinity<T>()}; }
};

}  // namespace dml
