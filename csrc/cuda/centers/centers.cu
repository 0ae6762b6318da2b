// Launches the kernels on classes with several centres.
#include "cuda/centers/centers.h"
#include "cuda/centers/lengths.cuh"
#include "cuda/centers/rows.cuh"
#include "cuda/common/launch.h"

namespace dml::cuda {
namespace {

dim3 blocks_of_points(int64_t count) { return dim3(unsigned((count + kWarpSize - 1) / kWarpSize)); }

// Calls f(policy) with a value that only names the type.
template <typename T, typename F>
void with_policy(CenterLoss loss, const F& f) {
    const CenterParams any = {};
    if (loss == CenterLoss::kSoftTriple) {
        f(SoftTriple<T>(any));
    } else {
        f(SubCenters<T>(any));
    }
}

}  // namespace

template <typename T>
void inverse_lengths(const StridedPoints<const T>& points, T tiny, T* inverse, cudaStream_t stream) {
    launch(store_inverse_lengths<T>, blocks_of_points(points.count), dim3(kTripletThreads), kLengthBytes,
           stream, points, tiny, inverse);
}

template <typename T>
void through_norm(const StridedPoints<T>& gradient, const StridedPoints<const T>& points, const T* inverse,
                  cudaStream_t stream) {
    launch(take_out_lengths<T>, blocks_of_points(points.count), dim3(kTripletThreads), kLengthBytes, stream,
           gradient, points, inverse);
}

template <typename T>
void center_losses(const CenterBlock<T>& block, CenterLoss loss, const CenterParams& params,
                   CenterRow<T>* rows, T* losses, T* saved, cudaStream_t stream) {
    const CenterTile tile = CenterTile::of<T>(block.per_class);
    with_policy<T>(loss, [&](auto policy) {
        launch(center_row_losses<T, decltype(policy)>, dim3(unsigned(block.rows)), dim3(kTripletThreads),
               tile.shared_bytes<T>(), stream, block, tile, params, rows, losses, saved);
    });
}

template <typename T>
void center_weights(const CenterBlock<T>& block, CenterLoss loss, const CenterParams& params, const T* grad,
                    const T* saved, double* by_params, cudaStream_t stream) {
    const CenterTile tile = CenterTile::of<T>(block.per_class);
    with_policy<T>(loss, [&](auto policy) {
        launch(center_row_weights<T, decltype(policy)>, dim3(unsigned(block.rows)), dim3(kTripletThreads),
               tile.shared_bytes<T>(), stream, block, tile, params, grad, saved, by_params);
    });
}

#define DML_CENTERS(T)                                                                                       \
    template void inverse_lengths(const StridedPoints<const T>&, T, T*, cudaStream_t);                       \
    template void through_norm(const StridedPoints<T>&, const StridedPoints<const T>&, const T*,             \
                               cudaStream_t);                                                                \
    template void center_losses(const CenterBlock<T>&, CenterLoss, const CenterParams&, CenterRow<T>*, T*,   \
                                T*, cudaStream_t);                                                           \
    template void center_weights(const CenterBlock<T>&, CenterLoss, const CenterParams&, const T*, const T*, \
                                 double*, cudaStream_t);
DML_CENTERS(float)
DML_CENTERS(double)
#undef DML_CENTERS

}  // namespace dml::cuda
