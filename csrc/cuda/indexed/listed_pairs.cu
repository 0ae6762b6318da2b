// Launches the kernels on listed pairs.
#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/indexed/listed_pairs.cuh"

namespace dml::cuda {
namespace {

// Enough warps to fill the device several times; with more items, each warp has several.
dim3 warps_for(int64_t items) {
    constexpr int64_t kWarps = kPairThreads / kWarpSize, kBlocksPerMultiprocessor = 32;
    const int64_t most = kBlocksPerMultiprocessor * device_limits().multiprocessors;
    return dim3(unsigned(std::min((items + kWarps - 1) / kWarps, most)));
}

template <typename T>
bool whole(const T* data, int64_t dim) {
    return dim % Chunk<T>::kCount == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(Chunk<T>) == 0;
}

}  // namespace

template <typename T>
void multiply_pairs(const PointList<T>& x, const PointList<T>& y, const int64_t* rows, const int64_t* cols,
                    int64_t pairs, T* out, cudaStream_t stream) {
    const bool fast = whole(x.data, x.dim) && whole(y.data, y.dim);
    launch(fast ? pair_products<T, true> : pair_products<T, false>, warps_for(pairs), dim3(kPairThreads), 0,
           stream, x, y, rows, cols, pairs, out);
}

template <typename T>
void sum_pairs(const T* weights, const PointList<T>& points, const int64_t* index, const Segments& segments,
               T* out, cudaStream_t stream) {
    const int64_t slices = (points.dim + kWarpSlice<T> - 1) / kWarpSlice<T>;
    const bool fast = whole(points.data, points.dim) && whole(out, points.dim);
    launch(fast ? pair_sums<T, true> : pair_sums<T, false>, warps_for(segments.count * slices),
           dim3(kPairThreads), 0, stream, weights, points, index, segments, out);
}

template <typename T>
void log_sum_exps(const T* logits, const Segments& segments, bool plus_one, T* out, cudaStream_t stream) {
    launch(segment_logsumexp<T>, warps_for(segments.count), dim3(kPairThreads), 0, stream, logits, segments,
           plus_one, out);
}

template <typename T>
void softmaxes(const T* grad, const T* logits, const T* value, const Segments& segments, T* out,
               cudaStream_t stream) {
    launch(segment_softmax<T>, warps_for(segments.count), dim3(kPairThreads), 0, stream, grad, logits, value,
           segments, out);
}

template void multiply_pairs(const PointList<float>&, const PointList<float>&, const int64_t*, const int64_t*,
                             int64_t, float*, cudaStream_t);
template void multiply_pairs(const PointList<double>&, const PointList<double>&, const int64_t*,
                             const int64_t*, int64_t, double*, cudaStream_t);
template void sum_pairs(const float*, const PointList<float>&, const int64_t*, const Segments&, float*,
                        cudaStream_t);
template void sum_pairs(const double*, const PointList<double>&, const int64_t*, const Segments&, double*,
                        cudaStream_t);
template void log_sum_exps(const float*, const Segments&, bool, float*, cudaStream_t);
template void log_sum_exps(const double*, const Segments&, bool, double*, cudaStream_t);
template void softmaxes(const float*, const float*, const float*, const Segments&, float*, cudaStream_t);
template void softmaxes(const double*, const double*, const double*, const Segments&, double*, cudaStream_t);

}  // namespace dml::cuda
