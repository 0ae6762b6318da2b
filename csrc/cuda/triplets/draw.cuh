// A row's draws by distance.
#pragma once

#include "cuda/triplets/row.cuh"

namespace dml::cuda {

// Thread t owns the t-th piece of the columns; below[t] is the weight of all pieces before it.
template <typename T>
struct RowDraw {
    const TripletRow<T>& row;
    double* below;  // [kTripletThreads + 1], shared
    int64_t piece;
    T most;

    DML_DEVICE explicit RowDraw(const TripletRow<T>& drawn)
        : row(drawn),
          below(shared_array<double>(kMergeBytes, kTripletThreads + 1)),
          piece((drawn.columns + kTripletThreads - 1) / kTripletThreads) {
        T largest = -infinity<T>();
        for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) {
            const T log_weight = draw_log_weight(row.params, -row.s[j]);
            largest = log_weight > largest ? log_weight : largest;
        }
        most = merge_max(largest);
        double sum = 0, total;
        for (int64_t j = begin(threadIdx.x); j < begin(threadIdx.x + 1); ++j) sum += weight(j);
        below[threadIdx.x] = block_scan(sum, total);
        if (threadIdx.x == 0) below[kTripletThreads] = total;
        block_sync();
    }
    DML_DEVICE int64_t begin(int64_t t) const { return t * piece < row.columns ? t * piece : row.columns; }
    DML_DEVICE double weight(int64_t j) const {
        const T log_weight = draw_log_weight(row.params, -row.s[j]);
        return log_weight > -infinity<T>() ? double(exp_fast(log_weight - most)) : 0.0;
    }
    // By one thread. The column for a number in (0, 1), or -1 where all weights are 0.
    DML_DEVICE int64_t column(double u) const {
        const double total = below[kTripletThreads], target = u * total;
        if (!(total > 0)) return -1;
        int t = 0;  // the first piece that ends above the target
        for (int step = kTripletThreads / 2; step > 0; step /= 2) {
            if (!(below[t + step] > target)) t += step;
        }
        double sum = below[t];
        int64_t found = -1;
        for (int64_t j = begin(t); j < begin(t + 1); ++j) {
            const double column_weight = weight(j);
            if (!(column_weight > 0)) continue;
            found = j;
            sum += column_weight;
            if (sum > target) break;
        }
        return found;
    }
};

}  // namespace dml::cuda
