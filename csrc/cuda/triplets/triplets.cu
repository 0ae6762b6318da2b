// Launches the kernels on triplets.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/triplets/distances.cuh"
#include "cuda/triplets/loss.cuh"
#include "cuda/triplets/select.cuh"

namespace dml::cuda {
namespace {

// Memory of the blocks' workspaces: with very many columns fewer blocks take several rows each.
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
void make_distances(const TripletStrip<T>& strip, const T* x, const T* x_squares, const T* y,
                    const T* y_squares, int64_t dim, cudaStream_t stream) {
    const int64_t items = strip.rows * ((strip.columns + kWarpSize - 1) / kWarpSize);
    const int64_t most = int64_t(64) * device_limits().multiprocessors;
    const dim3 grid(unsigned(std::min((items + kTripletWarps - 1) / kTripletWarps, most)));
    launch(distances_from_products<T>, grid, dim3(kTripletThreads), 0, stream, strip, x, x_squares, y,
           y_squares, dim);
}

template <typename T>
void triplet_rows(const TripletStrip<T>& strip, const TripletRules& rules, const T* beta, T* sums,
                  int64_t* counts, T* grad_beta, void* workspace, cudaStream_t stream) {
    launch(triplet_row_losses<T>, dim3(unsigned(blocks_for<T>(strip.rows, strip.columns))),
           dim3(kTripletThreads), kTripletSharedBytes, stream, strip, rules, beta, sums, counts, grad_beta,
           static_cast<unsigned char*>(workspace), power_of_two(strip.columns),
           TripletWork<T>::bytes(strip.columns));
}

template <typename T>
void select_rows(const TripletStrip<T>& strip, const TripletRules& rules, const SelectedPairs& pairs,
                 int64_t* columns, T* similarities, void* workspace, cudaStream_t stream) {
    launch(select_of_rows<T>, dim3(unsigned(blocks_for<T>(strip.rows, strip.columns))), dim3(kTripletThreads),
           kTripletSharedBytes, stream, strip, rules, pairs, columns, similarities,
           static_cast<unsigned char*>(workspace), power_of_two(strip.columns),
           TripletWork<T>::bytes(strip.columns));
}

#define DML_TRIPLETS(T)                                                                                    \
    template int64_t triplet_workspace_bytes<T>(int64_t, int64_t);                                         \
    template void make_distances(const TripletStrip<T>&, const T*, const T*, const T*, const T*, int64_t,  \
                                 cudaStream_t);                                                            \
    template void triplet_rows(const TripletStrip<T>&, const TripletRules&, const T*, T*, int64_t*, T*,    \
                               void*, cudaStream_t);                                                       \
    template void select_rows(const TripletStrip<T>&, const TripletRules&, const SelectedPairs&, int64_t*, \
                              T*, void*, cudaStream_t);
DML_TRIPLETS(float)
DML_TRIPLETS(double)
#undef DML_TRIPLETS

}  // namespace dml::cuda
