// The ops on classes with several centres on CUDA tensors. The products are PyTorch's, float32 as precisely as the
// user has set it; what lies between them are the kernels of cuda/centers. Nothing here waits for the device.
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/centers/centers.h"
#include "torch/center_ops.h"

namespace dml::cuda {
namespace {

struct CenterKernelsOnCuda {
    using Guard = c10::cuda::CUDAGuard;

    template <typename T>
    static StridedPoints<T> strided(T* data, const at::Tensor& points) {
        return {data, points.size(0), points.size(1), points.stride(0), points.stride(1)};
    }

    template <typename T>
    static at::Tensor inverse_lengths(const at::Tensor& points) {
        const at::Tensor inverse = at::empty({points.size(0)}, points.options());
        cuda::inverse_lengths<T>(strided(points.const_data_ptr<T>(), points), T(kTinyNorm),
                                 inverse.data_ptr<T>(), c10::cuda::getCurrentCUDAStream());
        return inverse;
    }

    template <typename T>
    static void through_norm(const at::Tensor& gradient, const at::Tensor& points,
                             const at::Tensor& inverse) {
        cuda::through_norm<T>(strided(gradient.data_ptr<T>(), gradient),
                              strided(points.const_data_ptr<T>(), points), inverse.const_data_ptr<T>(),
                              c10::cuda::getCurrentCUDAStream());
    }

    template <typename T>
    static void forward(const CenterBlock<T>& block, CenterLoss loss, const CenterParams& params,
                        CenterRow<T>* rows, T* losses, T* saved) {
        center_losses(block, loss, params, rows, losses, saved, c10::cuda::getCurrentCUDAStream());
    }

    template <typename T>
    static void backward(const CenterBlock<T>& block, CenterLoss loss, const CenterParams& params,
                         const T* grad, const T* saved, double* by_params) {
        center_weights(block, loss, params, grad, saved, by_params, c10::cuda::getCurrentCUDAStream());
    }
};

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CUDA, m) {
    m.impl("center_softmax", &center_softmax<CenterKernelsOnCuda>);
    m.impl("center_softmax_backward", &center_softmax_backward<CenterKernelsOnCuda>);
}

}  // namespace dml::cuda
