// The running numbers of all rows while tiles pass, and the bounds that mining makes of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels/tile_kernels.h"

namespace dml::cpu {

template <typename T>
struct RowAccumulators {
    std::vector<T> numbers;  // [7, N], the arrays below
    T *neg_a, *neg_b, *max_neg, *min_pos, *pos_a, *pos_b, *pos_context;

    RowAccumulators(int64_t n, Accumulator neg, Accumulator pos) : numbers(7 * n, T(0)) {
        T** const all[] = {&neg_a, &neg_b, &max_neg, &min_pos, &pos_a, &pos_b, &pos_context};
        for (int k = 0; k < 7; ++k) *all[k] = numbers.data() + k * n;
        if (neg == Accumulator::kLogSumExp) std::fill_n(neg_a, n, -infinity<T>());
        if (pos == Accumulator::kLogSumExp) std::fill_n(pos_a, n, -infinity<T>());
        std::fill_n(max_neg, n, -infinity<T>());
        std::fill_n(min_pos, n, infinity<T>());
    }

    T neg_value(const TileKernels<T>& formula, int64_t i) const {
        return value(formula, formula.neg, neg_a[i], neg_b[i]);
    }
    T pos_value(const TileKernels<T>& formula, int64_t i) const {
        return value(formula, formula.pos, pos_a[i], pos_b[i]);
    }

    void clear_negatives(const TileKernels<T>& formula, int64_t i) {
        neg_a[i] = formula.neg == Accumulator::kLogSumExp ? -infinity<T>() : T(0);
        neg_b[i] = T(0);
        max_neg[i] = -infinity<T>();
    }

   private:
    static T value(const TileKernels<T>& formula, Accumulator accumulator, T a, T b) {
        return accumulator == Accumulator::kSum ? b : LogSumExp<T>{a, b}.value(formula.plus_one);
    }
};

// The bounds of row i, now that its hardest kept negative is known. In exact arithmetic both kept sets are
// empty together; with rounding one may not be, so both are emptied.
template <typename T>
Bounds<T> close_bounds(const TileKernels<T>& formula, RowAccumulators<T>& accumulators, int64_t i,
                       T neg_above, T epsilon) {
    const T pos_below = accumulators.max_neg[i] + epsilon;
    if (accumulators.max_neg[i] != -infinity<T>() && accumulators.min_pos[i] < pos_below)
        return {pos_below, neg_above};
    accumulators.clear_negatives(formula, i);
    return Bounds<T>::none();
}

}  // namespace dml::cpu
