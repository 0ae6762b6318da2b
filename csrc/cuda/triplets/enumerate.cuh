// A row's triplets one by one: every positive with every negative, where positives are few.
#pragma once

#include "cuda/triplets/row.cuh"

namespace dml::cuda {

template <typename T>
struct TripletTotals {
    double sum = 0, by_param = 0;  // by_param: by the row's beta or margin
    int64_t nonzero = 0, considered = 0;
};

// d similarity / d product of a similarity -d, or 1.
template <typename T>
DML_DEVICE T inverse_distance(bool euclidean, T d) {
    return !euclidean ? T(1) : d > T(0) ? T(1) / d : T(0);
}

// Every positive with every negative: first the positives' derivatives, then visit(j, derivative) for each
// negative j.
template <typename T, typename Term, typename Visit>
DML_DEVICE void enumerate_positives(TripletRow<T>& row, TripletTotals<T>& totals, const Visit& visit) {
    const TripletParams<T>& params = row.params;
    T sum = 0;
    for (int64_t k = 0; k < row.count; ++k) {
        const T d_pos = row.work.d[k];
        T derivative = 0;
        for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) {
            const T d_neg = -row.s[j], violation = params.violation(d_pos, d_neg);
            if (!params.considered(d_pos, d_neg)) continue;
            ++totals.considered;
            if (!Term::counts(violation)) continue;
            sum += Term::value(violation);
            derivative += Term::derivative(violation);
            totals.nonzero += Term::nonzero(violation) ? 1 : 0;
        }
        const double all = merge_sum(double(derivative));
        if (threadIdx.x == 0) row.work.derivative[k] = all;
    }
    totals.sum += double(sum);
    for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) {
        const T d_neg = -row.s[j];
        T derivative = 0;
        for (int64_t k = 0; k < row.count; ++k) {
            const T d_pos = row.work.d[k], violation = params.violation(d_pos, d_neg);
            const bool counts = params.considered(d_pos, d_neg) && Term::counts(violation);
            derivative += counts ? Term::derivative(violation) : T(0);
        }
        visit(j, derivative);
    }
}

}  // namespace dml::cuda
