// Launches the kernels on triplets and ranks.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/triplets/distances.cuh"
#include "cuda/triplets/loss.cuh"
#include "cuda/triplets/ranking.cuh"
#include "cuda/triplets/select.cuh"

namespace dml::cuda {
namespace {

// Bytes of all thread blocks' workspaces: with very many columns, fewer blocks serve several rows each.
constexpr int64_t kWorkBytes = int64_t(64) << 20;

template <typename T>
int64_t blocks_for(int64_t rows, int64_t columns) {
    const int64_t most = std::max<int64_t>(kWorkBytes / TripletWork<T>::bytes(columns), 1);
    return std::min({rows, most, int64_t(1) << 20});
}

}  // namespace

template <typename T>
int64_t triplet_workspace_bytes(int64_t rows, int64_t columns) {
    return blocks_for<T>(rows, columns) * TripletWork<T>::bytes(columns);
}

template <typename T>
void make_distances(const TripletRowBlock<T>& row_block, const T* x, const T* x_squares, const T* y,
                    const T* y_squares, int64_t dim, cudaStream_t stream) {
    const int64_t items = row_block.rows * ((row_block.columns + kWarpSize - 1) / kWarpSize);
    const int64_t most = int64_t(64) * device_limits().multiprocessors;
    const dim3 grid(unsigned(std::min((items + kTripletWarps - 1) / kTripletWarps, most)));
    launch(distances_from_products<T>, grid, dim3(kTripletThreads), 0, stream, row_block, x, x_squares, y,
           y_squares, dim);
}

template <typename T>
void triplet_rows(const TripletRowBlock<T>& row_block, const TripletRules& rules, const T* row_params,
                  T* sums, int64_t* counts, T* grad_row_params, void* workspace, cudaStream_t stream) {
    launch(triplet_row_losses<T>, dim3(unsigned(blocks_for<T>(row_block.rows, row_block.columns))),
           dim3(kTripletThreads), kTripletSharedBytes, stream, row_block, rules, row_params, sums, counts,
           grad_row_params, static_cast<unsigned char*>(workspace), power_of_two(row_block.columns),
           TripletWork<T>::bytes(row_block.columns));
}

int64_t ranking_space(const RankingRules& rules, int64_t columns) {
    return rules.loss == Ranking::kFastAP ? std::max(columns, 3 * (rules.bins + 1)) : columns;
}

template <typename T>
void ranking_rows(const TripletRowBlock<T>& row_block, const RankingRules& rules, const double* row_weights,
                  T* losses, int64_t* counts, double* by_params, void* workspace, cudaStream_t stream) {
    const int64_t capacity = ranking_space(rules, row_block.columns);
    launch(ranking_row_losses<T>, dim3(unsigned(blocks_for<T>(row_block.rows, capacity))),
           dim3(kTripletThreads), kTripletSharedBytes, stream, row_block, rules, row_weights, losses, counts,
           by_params, static_cast<unsigned char*>(workspace), capacity, power_of_two(capacity),
           TripletWork<T>::bytes(capacity));
}

template <typename T>
void select_rows(const TripletRowBlock<T>& row_block, const TripletRules& rules, const SelectedPairs& pairs,
                 int64_t* columns, T* similarities, void* workspace, cudaStream_t stream) {
    launch(select_of_rows<T>, dim3(unsigned(blocks_for<T>(row_block.rows, row_block.columns))),
           dim3(kTripletThreads), kTripletSharedBytes, stream, row_block, rules, pairs, columns, similarities,
           static_cast<unsigned char*>(workspace), power_of_two(row_block.columns),
           TripletWork<T>::bytes(row_block.columns));
}

#define DML_TRIPLETS(T)                                                                                      \
    template int64_t triplet_workspace_bytes<T>(int64_t, int64_t);                                           \
    template void make_distances(const TripletRowBlock<T>&, const T*, const T*, const T*, const T*, int64_t, \
                                 cudaStream_t);                                                              \
    template void triplet_rows(const TripletRowBlock<T>&, const TripletRules&, const T*, T*, int64_t*, T*,   \
                               void*, cudaStream_t);                                                         \
    template void ranking_rows(const TripletRowBlock<T>&, const RankingRules&, const double*, T*, int64_t*,  \
                               double*, void*, cudaStream_t);                                                \
    template void select_rows(const TripletRowBlock<T>&, const TripletRules&, const SelectedPairs&,          \
                              int64_t*, T*, void*, cudaStream_t);
DML_TRIPLETS(float)
DML_TRIPLETS(double)
#undef DML_TRIPLETS

}  // namespace dml::cuda
