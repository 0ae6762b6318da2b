// Triplet terms, ranges and sampling, without the loops over triplets. Distances d are negated similarities,
// for any similarity. A column that is not a negative of the row has distance NaN: every comparison is false.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/accumulators.h"
#include "core/numeric.h"

namespace dml {

enum class TripletTerm { kHinge, kSoftplus, kMargin };

// Which positives, or which negatives of a chosen positive, form triplets.
enum class Selection { kAll, kHardest, kEasiest, kSemihard, kDrawn };

inline constexpr int kTripletParams = 10;

template <typename T>
struct TripletParams {
    T margin, gap_low, gap_high, pos_low, pos_high, neg_low, neg_high, cutoff, nonzero_cutoff, dim;

    TripletParams() = default;
    explicit DML_INLINE TripletParams(const double* p)
        : margin(T(p[0])),
          gap_low(T(p[1])),
          gap_high(T(p[2])),
          pos_low(T(p[3])),
          pos_high(T(p[4])),
          neg_low(T(p[5])),
          neg_high(T(p[6])),
          cutoff(T(p[7])),
          nonzero_cutoff(T(p[8])),
          dim(T(p[9])) {}

    DML_INLINE bool positive_allowed(T d) const { return d >= pos_low && d <= pos_high; }
    DML_INLINE bool negative_allowed(T d) const { return d >= neg_low && d <= neg_high; }
    DML_INLINE bool considered(T d_pos, T d_neg) const {
        const T gap = d_neg - d_pos;
        return gap > gap_low && gap <= gap_high;
    }
    DML_INLINE T violation(T d_pos, T d_neg) const { return (d_pos - d_neg) + margin; }
};

// With which every pair of a row may be chosen.
template <typename T>
DML_INLINE TripletParams<T> all_distances() {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const double params[kTripletParams] = {0, -inf, inf, -inf, inf, -inf, inf, 0, 0, 0};
    return TripletParams<T>(params);
}

// Terms of a triplet as functions of its violation. counts: whether the triplet adds to the loss or gradient.
template <typename T>
struct HingeTerm {
    static constexpr bool kSearchable = true;  // linear in the violation: runs of positives by prefix sums
    static DML_INLINE bool counts(T violation) { return violation > T(0); }
    static DML_INLINE bool nonzero(T violation) { return violation > T(0); }
    static DML_INLINE T value(T violation) { return violation; }
    static DML_INLINE T derivative(T) { return T(1); }
};
template <typename T>
struct SoftplusTerm {
    static constexpr bool kSearchable = false;
    static DML_INLINE bool counts(T violation) { return violation == violation; }
    static DML_INLINE bool nonzero(T violation) { return violation > kExpUnderflow<T>; }
    static DML_INLINE T value(T violation) { return softplus(violation); }
    static DML_INLINE T derivative(T violation) { return sigmoid(violation); }
};
// Counts the triplets of a pair.
template <typename T>
struct CountedTerm {
    static constexpr bool kSearchable = true;
    static DML_INLINE bool counts(T violation) { return violation == violation; }
    static DML_INLINE bool nonzero(T) { return false; }
    static DML_INLINE T value(T) { return T(0); }
    static DML_INLINE T derivative(T) { return T(1); }
};

// The pair terms of the margin loss.
template <typename T>
struct MarginTerms {
    T beta, margin;
    DML_INLINE T positive(T d) const { return relu((d - beta) + margin); }
    DML_INLINE T negative(T d) const { return relu((beta - d) + margin); }
};

// ---- runs of positives ------------------------------------------------------------------------------------
//
// The distances of a row's positives ascend. The positives that form triplets with a negative are one run
// [begin, end): each condition, rounded or not, changes only once along the row.

template <typename T>
struct FirstViolating {
    DML_INLINE bool operator()(const TripletParams<T>& p, T d_pos, T d_neg) const {
        return p.violation(d_pos, d_neg) > T(0);
    }
};
template <typename T>
struct FirstBelowGapHigh {
    DML_INLINE bool operator()(const TripletParams<T>& p, T d_pos, T d_neg) const {
        return d_neg - d_pos <= p.gap_high;
    }
};
template <typename T>
struct FirstNotAboveGapLow {
    DML_INLINE bool operator()(const TripletParams<T>& p, T d_pos, T d_neg) const {
        return !(d_neg - d_pos > p.gap_low);
    }
};

// ---- the draw by distance ---------------------------------------------------------------------------------

inline constexpr uint64_t kGoldenGamma = 0x9E3779B97F4A7C15u;

// The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
DML_INLINE uint64_t mix_bits(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The uniform number in (0, 1) for draw k of row i.
DML_INLINE double uniform_draw(uint64_t seed, uint64_t i, uint64_t k) {
    const uint64_t x = mix_bits(mix_bits(seed + kGoldenGamma * (i + 1)) + kGoldenGamma * (k + 1));
    return (static_cast<double>(x >> 40) + 0.5) * 0x1p-24;
}

// -log of the density of distances on the unit sphere in `dim` dimensions, up to a constant, at max(d,
// cutoff) (Wu et al., ICCV 2017). -inf (weight 0) where it is not finite or d >= nonzero_cutoff.
template <typename T>
DML_INLINE T draw_log_weight(const TripletParams<T>& p, T d) {
    d = d < p.cutoff ? p.cutoff : d;
    const T square = d * d, rest = T(1) - T(0.25) * square;
    const bool possible = d > T(0) && rest > T(0) && d < p.nonzero_cutoff;
    const T logs = (p.dim - T(2)) * log_fast(possible ? square : T(1)) +
                   (p.dim - T(3)) * log_fast(possible ? rest : T(1));
    return possible ? T(-0.5) * logs : -infinity<T>();
}

}  // namespace dml
