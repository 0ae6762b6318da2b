// Selects a positive or a negative for each row or pair.
#pragma once

#include "cuda/triplets/draw.cuh"

namespace dml::cuda {

// The first of ascending numbers that is not below `value`.
DML_DEVICE int64_t lower_bound(const int64_t* numbers, int64_t count, int64_t value) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (numbers[middle] < value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    select_of_rows(TripletRowBlock<T> row_block, TripletRules rules, SelectedPairs pairs, int64_t* columns,
                   T* similarities, unsigned char* workspace, int64_t space, int64_t work_bytes) {
    TripletRow<T> row;
    row.params = TripletParams<T>(rules.params);
    row.work = TripletWork<T>::at(workspace + blockIdx.x * work_bytes, row_block.columns, space);
    const Selection which = rules.negatives;
    for (int64_t r = blockIdx.x; r < row_block.rows; r += gridDim.x) {
        row.s = row_block.s + r * row_block.pitch;
        row.i = row_block.first + r;
        const int64_t from = pairs.listed ? lower_bound(pairs.anchors, pairs.count, row.i) : row.i;
        const int64_t to = pairs.listed ? lower_bound(pairs.anchors, pairs.count, row.i + 1) : row.i + 1;
        // Read before load() marks the positives; the positive's similarity waits in the place of the result.
        for (int64_t k = from + threadIdx.x; k < to; k += kTripletThreads) {
            const int64_t j = pairs.listed ? pairs.positives[k] : -1;
            columns[k] = j < 0 || j >= row_block.columns ? -1 : j;
            similarities[k] = columns[k] < 0 ? -infinity<T>() : row.s[columns[k]];
        }
        block_sync();
        row.load(row_block);
        if (pairs.of_positives) {
            const int64_t best = row.extreme_positive(which == Selection::kHardest);
            for (int64_t k = from + threadIdx.x; k < to; k += kTripletThreads) {
                columns[k] = best < 0 ? -1 : row.work.column[best];
                similarities[k] = best < 0 ? -infinity<T>() : -row.work.d[best];
            }
        } else if (which == Selection::kDrawn) {
            const RowDraw<T> draw(row);
            const uint64_t seed = uint64_t(*rules.seed);
            for (int64_t k = from + threadIdx.x; k < to; k += kTripletThreads) {
                const int64_t j = columns[k] < 0
                                      ? -1
                                      : draw.column(uniform_draw(seed, uint64_t(row.i), uint64_t(k - from)));
                columns[k] = j;
                similarities[k] = j < 0 ? -infinity<T>() : row.s[j];
            }
        } else {
            const bool semihard = which == Selection::kSemihard;
            const int64_t all =
                semihard ? -1 : row.extreme_negative(which == Selection::kHardest, infinity<T>());
            for (int64_t k = from; k < to; ++k) {
                const bool wanted = !pairs.listed || columns[k] >= 0;
                int64_t j = all;
                if (semihard) j = row.extreme_negative(true, wanted ? similarities[k] : -infinity<T>());
                block_sync();  // similarities[k] has been read by all threads
                if (threadIdx.x != 0) continue;
                columns[k] = wanted ? j : -1;
                similarities[k] = wanted && j >= 0 ? row.s[j] : -infinity<T>();
            }
        }
        block_sync();
    }
}

}  // namespace dml::cuda
