// Losses of classes that have several centres each. A row's similarity to a class is pooled from those to its
// centres; the loss is the cross entropy of the scaled similarities, that of the row's own class with a margin.
#pragma once

#include <cstdint>
#include <limits>

#include "core/accumulators.h"
#include "core/numeric.h"

namespace dml {

enum class CenterLoss { kSoftTriple, kSubCenters };

inline constexpr int kCenterParams = 3;

// Numbers, or numbers in the memory of the device.
struct CenterParams {
    double numbers[kCenterParams];
    const double* in_memory;

    DML_INLINE double operator[](int k) const { return in_memory ? in_memory[k] : numbers[k]; }
};

// All rows and the classes of a block.
template <typename T>
struct CenterBlock {
    T* s;  // [rows, classes * per_class] products of rows and centres; backward turns them into weights
    int64_t rows, classes, per_class;
    int64_t first_class, all_classes;
    const T *row_inverse, *center_inverse;  // [rows], [classes * per_class] 1 / length
    const int64_t* labels;                  // [rows]

    DML_INLINE bool is_first() const { return first_class == 0; }
    DML_INLINE bool is_last() const { return first_class + classes == all_classes; }
    DML_INLINE bool has_class(int64_t row) const { return labels[row] >= 0 && labels[row] < all_classes; }
};

// A row's numbers from block to block: the log-sum-exp of the logits of other classes, and the own logit.
template <typename T>
struct CenterRow {
    LogSumExp<T> others;
    T own;
};

// A row's loss, and what backward needs: the probability of other classes, which is accurate where that of the own
// class is near 1. That of one of them is exp(logit - most) share, without a rounded log-sum-exp of large logits.
template <typename T>
struct CenterResult {
    T loss, miss, most, share;

    DML_INLINE explicit CenterResult(const CenterRow<T>& row) {
        const T gap = row.others.max - row.own + std::log(row.others.sum);
        loss = softplus(gap);
        miss = row.others.empty() ? T(0) : sigmoid(gap);  // of a clamped exponential
        most = row.others.max;
        share = miss / row.others.sum;
    }
};

// What forward saves of all rows, [3, rows].
template <typename T>
struct SavedCenters {
    T *miss, *most, *share;

    static DML_INLINE SavedCenters at(T* saved, int64_t rows) {
        return {saved, saved + rows, saved + 2 * rows};
    }
    DML_INLINE void put(int64_t row, const CenterResult<T>& result) const {
        miss[row] = result.miss;
        most[row] = result.most;
        share[row] = result.share;
    }
    DML_INLINE void put_nothing(int64_t row) const { miss[row] = most[row] = share[row] = T(0); }
};

// The centres of a class as a row sees them. A policy visits them with `find`, then with `add`, then calls `close`;
// then `value` is the similarity to the class. By value, so that loops over classes are vectors.
template <typename T>
struct PooledCenters {
    T most = -infinity<T>();
    T extra = T(0);  // the policy's own
    T value = T(0);
};

// NaN counts as the most.
template <typename T>
DML_INLINE bool exceeds(T s, T most) {
    return s > most || s != s;
}

// Derivatives of the similarity to a class by that to a centre, and the centre's part of that by params[1].
template <typename T>
struct CenterDerivatives {
    T by_s, by_param;
};

// The similarity to the own class with its margin; its derivatives, also by params[1] and params[2].
template <typename T>
struct OwnSimilarity {
    T value, by_s, by_params[2];
};

// A softmax over the centres weighs them. params: la, gamma, margin.
template <typename T>
struct SoftTriple {
    T scale, inverse_gamma, margin;

    DML_INLINE explicit SoftTriple(const CenterParams& params)
        : scale(params[0] > 0 ? T(params[0]) : std::numeric_limits<T>::quiet_NaN()),
          inverse_gamma(params[1] > 0 ? T(1 / params[1]) : std::numeric_limits<T>::quiet_NaN()),
          margin(T(params[2])) {}

    DML_INLINE PooledCenters<T> find(const PooledCenters<T>& before, T s, T /*center*/) const {
        return {exceeds(s, before.most) ? s : before.most, T(0), T(0)};
    }
    // extra: the sum of the exponentials, and once closed its inverse.
    DML_INLINE PooledCenters<T> add(const PooledCenters<T>& before, T s) const {
        const T below = s - before.most, e = exp_fast(below * inverse_gamma);
        return {before.most, before.extra + e, before.value + e * below};
    }
    DML_INLINE PooledCenters<T> close(const PooledCenters<T>& sums) const {
        const T inverse = T(1) / sums.extra;
        return {sums.most, inverse, sums.most + sums.value * inverse};
    }
    DML_INLINE CenterDerivatives<T> derivatives(const PooledCenters<T>& pooled, T s, T /*center*/) const {
        const T share = exp_fast((s - pooled.most) * inverse_gamma) * pooled.extra;
        const T apart = (s - pooled.value) * inverse_gamma;
        return {share * (T(1) + apart), -share * apart * apart};
    }
    DML_INLINE OwnSimilarity<T> own(T s) const { return {s - margin, T(1), {T(0), T(-1)}}; }
};

// The nearest centre counts, and the margin is on the angle, as MarginSoftmax of losses/margin_softmax.h has it.
// params: scale, and the angle's cosine and sine.
template <typename T>
struct SubCenters {
    T scale, cosine, sine, shift, turn;

    DML_INLINE explicit SubCenters(const CenterParams& params)
        : scale(params[0] > 0 ? T(params[0]) : std::numeric_limits<T>::quiet_NaN()),
          cosine(T(params[1])),
          sine(T(params[2])),
          turn(T(angle(params[2], params[1]))) {
        shift = sine * turn;
    }

    // extra: which centre it is, the first among equals.
    DML_INLINE PooledCenters<T> find(const PooledCenters<T>& before, T s, T center) const {
        const bool nearer = exceeds(s, before.most);
        return {nearer ? s : before.most, nearer ? center : before.extra, T(0)};
    }
    DML_INLINE PooledCenters<T> add(const PooledCenters<T>& before, T /*s*/) const { return before; }
    DML_INLINE PooledCenters<T> close(const PooledCenters<T>& found) const {
        return {found.most, found.extra, found.most};
    }
    DML_INLINE CenterDerivatives<T> derivatives(const PooledCenters<T>& pooled, T /*s*/, T center) const {
        return {pooled.extra == center ? T(1) : T(0), T(0)};
    }
    // The derivative at angle 0, which is infinite, counts as that of the cosine alone.
    DML_INLINE OwnSimilarity<T> own(T s) const {
        const T sine_of_s = root(relu((T(1) - s) * (T(1) + s)));
        if (!(s >= -cosine)) {
            // The shift is sine * angle; the angle's derivatives are -sine by the cosine and cosine by the sine,
            // over the sum of their squares.
            const T squares = cosine * cosine + sine * sine;
            return {s - shift, T(1), {sine * sine / squares, -turn - sine * cosine / squares}};
        }
        const T slope = sine_of_s > T(0) ? s / sine_of_s : T(0);
        return {cosine * s - sine * sine_of_s, cosine + sine * slope, {s, -sine_of_s}};
    }
};

}  // namespace dml
