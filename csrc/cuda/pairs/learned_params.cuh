// Parameters that learn. Their values are read from device memory: one launch makes the formula of them, and
// backward has one more, which sums
//
//   dL/dtheta = sum over rows of upstream * (what theta does to the row's loss)
//
// Rows: what theta does to a row's loss for constant terms; on the matrix path, where forward turns
// similarities into derivatives, also to its terms. On tiles sum_terms_by_params visits the terms in backward.
#pragma once

#include "cuda/pairs/any_formula.cuh"
#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/reduce.cuh"
#include "cuda/pairs/row_weights.cuh"

namespace dml::cuda {

inline constexpr int kMakeThreads = kWarpSize;
static_assert(kMakeThreads >= kMaxParams, "a thread for each parameter");

// A formula, and its derivatives by each parameter, from values [params]; and a ticket of 0.
template <typename Acc>
__global__ void __launch_bounds__(kMakeThreads)
    make_formula(FormulaId id, const double* values, unsigned char* learned, unsigned* ticket) {
    wait_for_previous_kernel();
    with_formula(id, [&](auto tag) {
        using Formula = typename decltype(tag)::template Of<Acc>;
        using By = ByParam<Acc, Formula>;
        const int k = int(threadIdx.x);
        if (k == 0) *reinterpret_cast<Formula*>(learned) = Formula(values);
        if (k < Formula::kParamCount)
            *reinterpret_cast<By*>(learned + kFormulaBytes + k * kByParamBytes) = By(values, k);
    });
    if (threadIdx.x == 0) *ticket = 0;
}

// This thread's share of what parameter k does to rows first, first + step, ..., times upstream.
template <typename Acc>
DML_DEVICE double sum_rows_by_param(const RowsByParams<Acc>& rows, int k, int64_t first, int64_t step,
                                    const RowStats<Acc>& row_stats, const Upstream<Acc>& upstream) {
    double sum = 0;
#pragma unroll 2
    for (int64_t i = first; i < rows.rows; i += step) {
        sum += double(rows.at(k, 0, i) * upstream.pos(row_stats, i));
        if (upstream.last_part > 0) sum += double(rows.at(k, 1, i) * upstream.neg(row_stats, i));
    }
    return sum;
}
// The sum of all rows and terms as a gradient.
template <typename Acc>
DML_DEVICE double gradient_of_sum(double sum, const RowStats<Acc>& row_stats, const Upstream<Acc>& upstream) {
    const Acc factor = gradient_factor(row_stats, upstream);
    return factor == Acc(0) ? 0.0 : double(factor) * sum;
}

// Block k: the gradient by parameter k; the last, of what is no parameter, 0. out: [params + 1].
template <typename Acc>
__global__ void __launch_bounds__(kReduceThreads, 1)
    reduce_by_params(RowsByParams<Acc> rows, int params, RowStats<Acc> row_stats, Upstream<Acc> upstream,
                     double* out) {
    wait_for_previous_kernel();
    const int k = int(blockIdx.x);
    double sum = 0;
    if (k < params) sum = sum_rows_by_param(rows, k, threadIdx.x, blockDim.x, row_stats, upstream);
    sum = block_sum(sum, shared_array<double>(0, kWarpSize));
    if (threadIdx.x == 0) out[k] = k == params ? 0.0 : gradient_of_sum(sum, row_stats, upstream);
}

}  // namespace dml::cuda
