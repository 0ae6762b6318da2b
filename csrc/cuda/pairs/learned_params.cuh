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

// A formula, and its derivatives by each parameter, from values [params].
template <typename Acc>
__global__ void __launch_bounds__(kMakeThreads)
    make_formula(FormulaId id, const double* values, unsigned char* learned) {
    with_formula(id, [&](auto tag) {
        using Formula = typename decltype(tag)::template Of<Acc>;
        using By = ByParam<Acc, Formula>;
        const int k = int(threadIdx.x);
        if (k == 0) *reinterpret_cast<Formula*>(learned) = Formula(values);
        if (k < count_names(Formula::kParams))
            *reinterpret_cast<By*>(learned + kFormulaBytes + k * kByParamBytes) = By(values, k);
    });
}

// The terms of a row's pairs that the parameters move are in `rows`; those of tiles in `tiles`, times upstream.
template <typename Acc>
struct ParamSums {
    const Acc* rows;  // [params, 2, count]
    int64_t count;
    const double* tiles;  // [params, slots]
    int64_t slots;
    int params;
};

// Block k: the gradient by parameter k; the last, of what is no parameter, 0. out: [params + 1].
template <typename Acc>
__global__ void __launch_bounds__(kReduceThreads, 1)
    reduce_by_params(ParamSums<Acc> sums, RowStats<Acc> row_stats, Upstream<Acc> upstream, double* out) {
    const int k = int(blockIdx.x);
    double sum = 0;
    if (k < sums.params) {
        const Acc* part0 = sums.rows + int64_t(2 * k) * sums.count;
        const Acc* part1 = part0 + sums.count;
#pragma unroll 2
        for (int64_t i = threadIdx.x; i < sums.count; i += blockDim.x) {
            sum += double(part0[i] * upstream.pos(row_stats, i));
            if (upstream.last_part > 0) sum += double(part1[i] * upstream.neg(row_stats, i));
        }
        for (int64_t slot = threadIdx.x; slot < sums.slots; slot += blockDim.x)
            sum += sums.tiles[k * sums.slots + slot];
    }
    sum = block_sum(sum, shared_array<double>(0, kWarpSize));
    if (threadIdx.x != 0) return;
    const Acc factor = gradient_factor(row_stats, upstream);
    out[k] = factor == Acc(0) || k == sums.params ? 0.0 : double(factor) * sum;
}

}  // namespace dml::cuda
