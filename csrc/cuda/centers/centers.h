// Losses of classes with several centres: entry points on raw pointers. None waits for the device.
#pragma once

#include <cstdint>

#include "core/centers.h"

#if defined(DML_CUDA_ON_HOST)
#include "cuda/common/primitives.cuh"
#else
#include <cuda_runtime_api.h>
#endif

namespace dml::cuda {

// Points [count, dim]; number d of point j lies at data[j * row + d * col].
template <typename T>
struct StridedPoints {
    T* data;
    int64_t count, dim, row, col;
};

// inverse[j] = 1 / length of point j, 0 up to `tiny`.
template <typename T>
void inverse_lengths(const StridedPoints<const T>& points, T tiny, T* inverse, cudaStream_t stream);

// gradient[j] -= (<gradient[j], point j> inverse[j]^2) point j.
template <typename T>
void through_norm(const StridedPoints<T>& gradient, const StridedPoints<const T>& points, const T* inverse,
                  cudaStream_t stream);

// Adds a block of classes to the rows' numbers [rows]; with the last block fills losses [rows], 0 where the label
// is no class, and saved [3, rows] (SavedCenters).
template <typename T>
void center_losses(const CenterBlock<T>& block, CenterLoss loss, const CenterParams& params,
                   CenterRow<T>* rows, T* losses, T* saved, cudaStream_t stream);

// Turns products into weights of the gradient: of unit points, times both inverse lengths. grad [rows]: the
// upstream gradient. by_params: null, or [rows, kCenterParams], to which the derivatives of the losses are added.
template <typename T>
void center_weights(const CenterBlock<T>& block, CenterLoss loss, const CenterParams& params, const T* grad,
                    const T* saved, double* by_params, cudaStream_t stream);

}  // namespace dml::cuda
