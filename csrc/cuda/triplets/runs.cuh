// A row's triplets as runs of its sorted positives, found by binary search for every negative
// (core/triplets.h).
#pragma once

#include "cuda/triplets/enumerate.cuh"

namespace dml::cuda {

// Bitonic, by distance and then column; past the end stands +inf.
template <typename T>
DML_DEVICE void sort_positives(TripletRow<T>& row) {
    int64_t space = 1;
    while (space < row.count) space *= 2;
    T* d = row.work.d;
    int32_t* column = row.work.column;
    for (int64_t k = row.count + threadIdx.x; k < space; k += kTripletThreads) {
        d[k] = infinity<T>();
        column[k] = INT32_MAX;
    }
    block_sync();
    for (int64_t size = 2; size <= space; size *= 2) {
        for (int64_t stride = size / 2; stride > 0; stride /= 2) {
            for (int64_t pair = threadIdx.x; pair < space / 2; pair += kTripletThreads) {
                const int64_t a = 2 * pair - (pair & (stride - 1)), b = a + stride;
                const bool up = (a & size) == 0;
                const bool above = d[a] > d[b] || (d[a] == d[b] && column[a] > column[b]);
                if (above != up) continue;
                const T distance = d[a];
                const int32_t moved = column[a];
                d[a] = d[b];
                column[a] = column[b];
                d[b] = distance;
                column[b] = moved;
            }
            block_sync();
        }
    }
}

// The first positive for which `first` holds, or their number.
template <typename T, typename First>
DML_DEVICE int64_t search(const TripletRow<T>& row, T d_neg, const First& first) {
    int64_t low = 0, high = row.count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (first(row.params, row.work.d[middle], d_neg)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// Terms that are sums over runs of the sorted positives.
template <typename T, typename Term, typename Visit>
DML_DEVICE void sum_runs(TripletRow<T>& row, TripletTotals<T>& totals, const Visit& visit) {
    constexpr bool kViolating = std::is_same_v<Term, HingeTerm<T>>;
    const TripletWork<T>& work = row.work;
    sort_positives(row);
    double before = 0;
    for (int64_t from = 0; from < row.count; from += kTripletThreads) {
        const int64_t k = from + threadIdx.x;
        double all;
        const double sum = before + block_scan(k < row.count ? double(work.d[k]) : 0.0, all);
        if (k < row.count) work.prefix[k] = sum;
        before += all;
    }
    if (threadIdx.x == 0) work.prefix[row.count] = before;
    for (int64_t k = threadIdx.x; k <= row.count; k += kTripletThreads) work.step[k] = 0;
    block_sync();
    for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) {
        const T d_neg = -row.s[j];
        int64_t begin = row.count, end = row.count;
        if (d_neg == d_neg) {
            begin = search(row, d_neg, FirstBelowGapHigh<T>());
            end = search(row, d_neg, FirstNotAboveGapLow<T>());
            end = end < begin ? begin : end;
            totals.considered += end - begin;
            if (kViolating) {
                const int64_t violating = search(row, d_neg, FirstViolating<T>());
                begin = violating > begin ? violating : begin;
                begin = begin < end ? begin : end;
            }
        }
        if (begin < end) {  // integers: any order gives the same sums
            atomic_add(work.step + begin, 1);
            atomic_add(work.step + end, -1);
            if (kViolating) {
                const double length = double(end - begin);
                totals.sum += work.prefix[end] - work.prefix[begin] +
                              length * (double(row.params.margin) - double(d_neg));
                totals.nonzero += end - begin;
            }
        }
        visit(j, T(end - begin));
    }
    block_sync();
    int64_t inside = 0;
    for (int64_t from = 0; from < row.count; from += kTripletThreads) {
        const int64_t k = from + threadIdx.x;
        const int step = k < row.count ? work.step[k] : 0;
        int all;
        const int64_t sum = inside + block_scan(step, all) + step;
        if (k < row.count) work.derivative[k] = double(sum);
        inside += all;
    }
}

}  // namespace dml::cuda
