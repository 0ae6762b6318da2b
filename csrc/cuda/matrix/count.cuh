// How many pairs mining keeps of each row of the matrix: by a warp, or by a block where rows are long.
#pragma once

#include "cuda/matrix/rows.cuh"

namespace dml::cuda {

template <typename Acc>
struct CountTask : MatrixRows<Acc> {
    int64_t all;      // rows of the batch
    int64_t* counts;  // [2, all] positives, negatives

    DML_DEVICE bool has_nan(int64_t row, int64_t cols, int64_t from, int64_t step) const {
        bool found = !is_finite(this->saved.query_norms[row]);
        for (int64_t j = from; j < cols; j += step) found |= !is_finite(this->saved.ref_norms[j]);
        return found;
    }
};

template <bool kBlock, typename Acc>
__global__ void __launch_bounds__(kTeamThreads, 2)
    count_kept_pairs(const __grid_constant__ CountTask<Acc> task) {
    wait_for_previous_kernel();
    constexpr int kRows = kBlock ? 1 : kTeamWarps;  // of a block at once
    const Team<kBlock, Acc> team = {shared_array<Acc>(0, kMostMerged * kTeamWarps)};
    const int64_t cols = rows_in_use(task.num_valid_refs, task.refs);
#pragma unroll 1
    for (int64_t i = int64_t(blockIdx.x) * kRows + (kBlock ? 0 : uniform_warp_id()); i < task.saved.rows;
         i += int64_t(gridDim.x) * kRows) {
        const auto pairs = RowPairs<kBlock, Acc>::of(task, team, i, cols);
        Bounds<Acc> bounds = Bounds<Acc>::all();
        if (task.mining.on) {
            const Extremes<Acc> hardest = pairs.find_hardest(task);
            // Where a point is not finite no pair is known to be easy.
            Acc nan[1] = {Acc(task.has_nan(i, cols, team.thread(), team.kThreads))};
            team.merge(nan, Maximum{});
            bounds = nan[0] > Acc(0) && hardest.has_both() ? bounds : hardest.mined(Acc(task.mining.epsilon));
        }
        int count[2] = {0, 0};
        pairs.template for_each<4>(pairs.self, [&](Acc s, bool positive) {
            count[0] += positive && s < bounds.pos_below;
            count[1] += !positive && s > bounds.neg_above;
        });
        // In halves, which a float adds up exactly.
        constexpr int kHalf = 1 << 12;
        Acc sums[4] = {Acc(count[0] % kHalf), Acc(count[0] / kHalf), Acc(count[1] % kHalf),
                       Acc(count[1] / kHalf)};
        team.merge(sums, Plus{});
        if (team.thread() != 0) continue;
        for (int k = 0; k < 2; ++k)
            task.counts[k * task.all + task.first + i] =
                int64_t(sums[2 * k]) + int64_t(sums[2 * k + 1]) * kHalf;
    }
}

}  // namespace dml::cuda
