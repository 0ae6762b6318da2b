// The ranking losses as functions of a row's ranks, or of its histogram, without the loops over similarities.
#pragma once

#include "core/numeric.h"

namespace dml {

enum class Ranking { kSmoothAP, kRecallAtK, kFastAP };

// At most so many cut-offs K of Recall@K.
inline constexpr int kMostCutoffs = 64;

// At a larger argument x, sigmoid(-x) is below epsilon squared: nothing beside 1 in any sum of them.
template <typename T>
inline constexpr T kSaturated = sizeof(T) == 8 ? T(73) : T(33);

// The sigmoid of x and its derivative, neither by a difference of near numbers.
template <typename T>
struct Logistic {
    T value, slope;
    explicit DML_INLINE Logistic(T x) {
        const T e = exp_fast(x < T(0) ? x : -x);
        const T share = T(1) / (T(1) + e), rest = e * share;
        value = x < T(0) ? rest : share;
        slope = rest * share;
    }
    // The same from exp(-x).
    static DML_INLINE Logistic of_exponential(T e) {
        const T share = T(1) / (T(1) + e);
        return Logistic(share, (e * share) * share);
    }

   private:
    DML_INLINE Logistic(T v, T s) : value(v), slope(s) {}
};

// exp((s_j - s_k) / temperature) is a product of a factor of each: one exponential a column serves all positives
// within kReach temperatures of a centre. A column beyond all of them counts as one that is saturated for each.
template <typename T>
inline constexpr T kReach = sizeof(T) == 8 ? T(300) : T(24);

template <typename T>
DML_INLINE T near_factor(T s, T centre, T inverse) {
    return exp_fast((s - centre) * inverse);
}
// Of a column; the largest for NaN, which adds nothing.
template <typename T>
DML_INLINE T far_factor(T s, T centre, T inverse) {
    constexpr T most = kSaturated<T> + kReach<T>;
    const T x = (centre - s) * inverse, below = x < most ? x : most;
    return exp_fast(below > -most ? below : -most);
}

// ---- ranks -----------------------------------------------------------------------------------------------

// What a positive adds to the row's score, by its rank among all columns and among the positives.
struct RankTerm {
    double value, by_rank, by_pos_rank, by_temperature_k;
};

// Smooth-AP (Brown et al., ECCV 2020): the precision at the positive.
DML_INLINE RankTerm precision_at(double rank, double pos_rank) {
    return {pos_rank / rank, -pos_rank / (rank * rank), 1 / rank, 0};
}

// The recall surrogate (Patel et al., CVPR 2022): whether the positive is among the first K, for each of
// `count` cut-offs K, on average.
template <typename T>
DML_INLINE RankTerm found_at(const T* cutoffs, int count, double temperature_k, double rank) {
    RankTerm term = {0, 0, 0, 0};
    for (int k = 0; k < count; ++k) {
        const double x = (double(cutoffs[k]) - rank) / temperature_k;
        const Logistic<double> step(x);
        term.value += step.value / count;
        term.by_rank -= step.slope / (temperature_k * count);
        term.by_temperature_k -= step.slope * x / (temperature_k * count);
    }
    return term;
}

// ---- histograms ------------------------------------------------------------------------------------------

// The place of a similarity among `bins` bins of squared distances of unit points, 2 - 2 s in [0, 4].
template <typename T>
DML_INLINE T bin_place(T s, T bins) {
    const T place = (T(1) - s) * (bins / T(2));
    const T above = place > T(0) ? place : T(0);
    return place < bins ? above : place == place ? bins : place;
}

// How much of a pair at `place` lies at or below the edge `b`, each pair spread over its two nearest edges.
template <typename T>
DML_INLINE T share_below(T place, T b) {
    const T share = b + T(1) - place;
    return share < T(1) ? (share > T(0) ? share : T(0)) : T(1);
}

}  // namespace dml
