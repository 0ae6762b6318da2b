// A row of similarities and its chosen positives, gathered by one thread block into its workspace.
#pragma once

#include "cuda/triplets/block.cuh"
#include "cuda/triplets/triplets.h"

namespace dml::cuda {

inline int64_t power_of_two(int64_t x) {
    int64_t power = 1;
    while (power < x) power *= 2;
    return power;
}

template <typename T>
struct TripletWork {
    T* d;                // [space] distances of the chosen positives
    int32_t* column;     // [space] their columns
    double* prefix;      // [columns + 1] sums of the first so many distances, or weights of chosen negatives
    double* derivative;  // [columns + 1] of the positives
    int32_t* step;       // [columns + 1] where runs begin and end, or chosen negatives

    static int64_t bytes(int64_t columns) {
        const int64_t total = power_of_two(columns) * int64_t(sizeof(T) + sizeof(int32_t)) +
                              (columns + 1) * int64_t(2 * sizeof(double) + sizeof(int32_t));
        return (total + 15) / 16 * 16;
    }
    static DML_DEVICE TripletWork at(void* memory, int64_t columns, int64_t space) {
        TripletWork work;
        work.prefix = static_cast<double*>(memory);
        work.derivative = work.prefix + columns + 1;
        work.d = reinterpret_cast<T*>(work.derivative + columns + 1);
        work.column = reinterpret_cast<int32_t*>(work.d + space);
        work.step = work.column + space;
        return work;
    }
};

template <typename T>
struct TripletRow {
    T* s;             // [columns]
    int64_t i;        // its index among all
    int64_t columns;  // that take part
    int64_t count;    // chosen positives
    TripletParams<T> params;
    TripletWork<T> work;

    // Gathers the positives, in the order of their columns; these and negatives that are not allowed become
    // NaN in the row.
    DML_DEVICE void load(const TripletRowBlock<T>& row_block) {
        columns = rows_in_use(row_block.num_valid_refs, row_block.columns);
        const int64_t self = row_block.square ? i : row_block.self_index ? row_block.self_index[i] : -1;
        count = 0;
        for (int64_t from = row_block.begin[i]; from < row_block.end[i]; from += kTripletThreads) {
            const int64_t k = from + threadIdx.x;
            const int64_t j = k < row_block.end[i] ? row_block.members[k] : columns;
            const bool exists = j < columns;
            const T distance = exists ? -s[j] : T(0);
            const bool keep = exists && j != self && params.positive_allowed(distance);
            int kept;
            const int64_t at = count + block_scan(keep ? 1 : 0, kept);
            if (keep) {
                work.d[at] = distance;
                work.column[at] = int32_t(j);
            }
            if (exists) s[j] = not_a_number<T>();
            count += kept;
        }
        block_sync();
        if (params.neg_low == -infinity<T>() && params.neg_high == infinity<T>()) return;
        for (int64_t j = threadIdx.x; j < columns; j += kTripletThreads) {
            if (!params.negative_allowed(-s[j])) s[j] = not_a_number<T>();
        }
        block_sync();
    }

    // The index of the farthest or nearest positive, the first among equals, or -1.
    DML_DEVICE int64_t extreme_positive(bool farthest) const {
        T best = -infinity<T>();
        int64_t at = count;
        for (int64_t k = threadIdx.x; k < count; k += kTripletThreads) {
            const T value = farthest ? work.d[k] : -work.d[k];
            if (value > best) {
                best = value;
                at = k;
            }
        }
        const T most = merge_max(best);
        at = merge_min(best == most ? at : count);
        return at < count ? at : -1;
    }
    DML_DEVICE void choose_positives(Selection which) {
        if (which == Selection::kAll || count == 0) return;
        const int64_t best = extreme_positive(which == Selection::kHardest);
        const T distance = work.d[best];
        const int32_t column = work.column[best];
        block_sync();
        if (threadIdx.x == 0) {
            work.d[0] = distance;
            work.column[0] = column;
        }
        count = 1;
        block_sync();
    }

    // The column of the largest similarity below the limit, or of the smallest; the first among equals, or
    // -1.
    DML_DEVICE int64_t extreme_negative(bool largest, T limit) const {
        T best = -infinity<T>();
        int64_t at = columns;
        for (int64_t j = threadIdx.x; j < columns; j += kTripletThreads) {
            const T value = largest ? s[j] : -s[j];
            if (value > best && (!largest || value < limit)) {
                best = value;
                at = j;
            }
        }
        const T most = merge_max(best);
        at = merge_min(best == most ? at : columns);
        return at < columns ? at : -1;
    }
};

}  // namespace dml::cuda
