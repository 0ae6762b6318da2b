// Entry points of the kernels on listed pairs: raw pointers, sizes and a stream, for float and double; no
// torch header, no host synchronisation. An index out of range is never followed: results that depend on it
// are NaN.
#pragma once

#include <cstdint>

#if defined(DML_CUDA_ON_HOST)
#include "../../../tests/emulator/cuda_language.h"
#else
#include <cuda_runtime_api.h>  // for cudaStream_t
#endif

namespace dml::cuda {

template <typename T>
struct PointList {
    const T* data;  // [count, dim], contiguous
    int64_t count, dim;
};

// Segment r of [0, length) is [offsets[r], offsets[r + 1]).
struct Segments {
    const int64_t* offsets;  // [count + 1]
    int64_t count, length;
};

// out[k] = <x[rows[k]], y[cols[k]]>
template <typename T>
void multiply_pairs(const PointList<T>& x, const PointList<T>& y, const int64_t* rows, const int64_t* cols,
                    int64_t pairs, T* out, cudaStream_t stream);

// out[r] = sum of weights[k] * points[index[k]] over segment r. out [segments.count, dim]
template <typename T>
void sum_pairs(const T* weights, const PointList<T>& points, const int64_t* index, const Segments& segments,
               T* out, cudaStream_t stream);

// out[r] = log(sum exp(logits)) over segment r, or log(1 + sum exp(logits)).
template <typename T>
void log_sum_exps(const T* logits, const Segments& segments, bool plus_one, T* out, cudaStream_t stream);

// Its gradient: out[k] = grad[r] * exp(logits[k] - value[r]) over segment r; value: the result of
// log_sum_exps.
template <typename T>
void softmaxes(const T* grad, const T* logits, const T* value, const Segments& segments, T* out,
               cudaStream_t stream);

}  // namespace dml::cuda
