// One negative for each of a row's positives.
#pragma once

#include "cuda/triplets/draw.cuh"
#include "cuda/triplets/enumerate.cuh"

namespace dml::cuda {

// Writes the column of each chosen positive's negative, or -1, to work.step.
template <typename T>
DML_DEVICE void find_negatives(const TripletRow<T>& row, Selection which, uint64_t seed) {
    if (which == Selection::kDrawn) {
        const RowDraw<T> draw(row);
        for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads)
            row.work.step[k] = int32_t(draw.column(uniform_draw(seed, uint64_t(row.i), uint64_t(k))));
    } else if (which == Selection::kSemihard) {
        for (int64_t k = 0; k < row.count; ++k) {
            const int64_t j = row.extreme_negative(true, -row.work.d[k]);
            if (threadIdx.x == 0) row.work.step[k] = int32_t(j);
        }
    } else {
        const int64_t j = row.extreme_negative(which == Selection::kHardest, infinity<T>());
        for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) row.work.step[k] = int32_t(j);
    }
    block_sync();
}

// One negative for each chosen positive; the weights over the row's similarities.
template <typename T>
DML_DEVICE void selected_negatives(TripletRow<T>& row, const TripletRules& rules, T beta, uint64_t seed,
                                   TripletTotals<T>& totals) {
    const TripletWork<T>& work = row.work;
    const MarginTerms<T> margin{beta, row.params.margin};
    find_negatives(row, rules.negatives, seed);
    for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) {
        const int64_t j = work.step[k];
        const T d_pos = work.d[k], d_neg = j >= 0 ? -row.s[j] : T(0);
        T by_pos = 0, by_neg = 0;  // the term's derivatives by d_pos and by -d_neg
        if (j >= 0 && row.params.considered(d_pos, d_neg)) {
            ++totals.considered;
            if (rules.term == TripletTerm::kMargin) {
                const T pos_term = margin.positive(d_pos), neg_term = margin.negative(d_neg);
                by_pos = pos_term > T(0) ? T(1) : T(0);
                by_neg = neg_term > T(0) ? T(1) : T(0);
                totals.sum += double(pos_term) + double(neg_term);
                totals.nonzero += (pos_term > T(0) ? 1 : 0) + (neg_term > T(0) ? 1 : 0);
                totals.by_param += double(by_neg) - double(by_pos);
            } else {
                const T violation = row.params.violation(d_pos, d_neg);
                const bool hinge = rules.term == TripletTerm::kHinge;
                if (!hinge || HingeTerm<T>::counts(violation)) {
                    totals.sum += double(hinge ? violation : SoftplusTerm<T>::value(violation));
                    totals.nonzero += hinge || SoftplusTerm<T>::nonzero(violation) ? 1 : 0;
                    by_pos = by_neg = hinge ? T(1) : SoftplusTerm<T>::derivative(violation);
                    totals.by_param += double(by_pos);
                }
            }
        }
        work.derivative[k] = double(by_pos);
        work.prefix[k] = double(by_neg * inverse_distance(rules.euclidean, d_neg));
    }
    block_sync();
    if (!rules.write) return;
    for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) row.s[j] = T(0);
    block_sync();
    // Several positives may share a negative: the thread that owns the column adds their weights.
    for (int64_t k = 0; k < row.count; ++k) {
        const int64_t j = work.step[k];
        if (j >= 0 && (j & (kTripletThreads - 1)) == threadIdx.x) row.s[j] += T(work.prefix[k]);
    }
}

}  // namespace dml::cuda
