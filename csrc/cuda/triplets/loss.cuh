// The loss of a row, by one thread block: its positives are gathered into a workspace and every negative is
// compared with them, one by one where they are few, else as runs of the sorted positives. Floating-point
// sums are merged in a fixed order; atomics add integers only.
#pragma once

#include "cuda/triplets/runs.cuh"
#include "cuda/triplets/selected.cuh"

namespace dml::cuda {

// With more positives, runs are summed.
inline constexpr int64_t kFewTripletPositives = 32;

template <typename T, typename Term, typename Visit>
DML_DEVICE void all_terms(TripletRow<T>& row, TripletTotals<T>& totals, const Visit& visit) {
    if (Term::kSearchable && row.count > kFewTripletPositives) {
        sum_runs<T, Term>(row, totals, visit);
    } else {
        enumerate_positives<T, Term>(row, totals, visit);
    }
    block_sync();
}

// All negatives of a row; the weights over its similarities.
template <typename T>
DML_DEVICE void all_negatives(TripletRow<T>& row, const TripletRules& rules, T beta,
                              TripletTotals<T>& totals) {
    const auto write = [&](int64_t j, T derivative) {
        if (!rules.write) return;
        row.s[j] = derivative != T(0) ? derivative * inverse_distance(rules.euclidean, -row.s[j]) : T(0);
    };
    if (rules.term == TripletTerm::kHinge) {
        all_terms<T, HingeTerm<T>>(row, totals, write);
    } else if (rules.term == TripletTerm::kSoftplus) {
        all_terms<T, SoftplusTerm<T>>(row, totals, write);
    } else {
        const MarginTerms<T> terms{beta, row.params.margin};
        all_terms<T, CountedTerm<T>>(row, totals, [&](int64_t j, T uses) {
            const T term = uses > T(0) ? terms.negative(-row.s[j]) : T(0);
            if (term > T(0)) {
                totals.sum += double(uses) * double(term);
                totals.nonzero += int64_t(uses);
                totals.by_param += double(uses);
            }
            write(j, term > T(0) ? uses : T(0));
        });
        for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) {
            const double uses = row.work.derivative[k];
            const T term = terms.positive(row.work.d[k]);
            row.work.derivative[k] = term > T(0) ? uses : 0.0;
            if (term > T(0)) {
                totals.sum += uses * double(term);
                totals.nonzero += int64_t(uses);
                totals.by_param -= uses;
            }
        }
        block_sync();
    }
}

template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    triplet_row_losses(TripletRowBlock<T> row_block, TripletRules rules, const T* row_params, T* sums,
                       int64_t* counts, T* grad_row_params, unsigned char* workspace, int64_t space,
                       int64_t work_bytes) {
    TripletRow<T> row;
    row.params = TripletParams<T>(rules.params);
    row.work = TripletWork<T>::at(workspace + blockIdx.x * work_bytes, row_block.columns, space);
    for (int64_t r = blockIdx.x; r < row_block.rows; r += gridDim.x) {
        row.s = row_block.s + r * row_block.pitch;
        row.i = row_block.first + r;
        const bool has_beta = rules.term == TripletTerm::kMargin;
        if (row_params && !has_beta) row.params.margin = row_params[row.i];
        row.load(row_block);
        row.choose_positives(rules.positives);
        TripletTotals<T> totals;
        const T beta = has_beta ? row_params[row.i] : T(0);
        if (rules.negatives == Selection::kAll) {
            all_negatives(row, rules, beta, totals);
            if (grad_row_params && !has_beta) {
                for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads)
                    totals.by_param += row.work.derivative[k];
            }
        } else {
            selected_negatives(row, rules, beta, rules.seed ? uint64_t(*rules.seed) : 0, totals);
        }
        if (rules.write) {
            for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) {
                const T inverse = inverse_distance(rules.euclidean, row.work.d[k]);
                row.s[row.work.column[k]] = T(-row.work.derivative[k]) * inverse;
            }
            for (int64_t j = row.columns + threadIdx.x; j < row_block.columns; j += kTripletThreads)
                row.s[j] = T(0);
        }
        const double sum = merge_sum(totals.sum), by_param = merge_sum(totals.by_param);
        const int64_t nonzero = merge_sum(totals.nonzero), considered = merge_sum(totals.considered);
        if (threadIdx.x != 0) continue;
        sums[row.i] = T(sum);
        counts[2 * row.i] = nonzero;
        counts[2 * row.i + 1] = considered;
        if (grad_row_params) grad_row_params[row.i] = T(by_param);
    }
}

}  // namespace dml::cuda
