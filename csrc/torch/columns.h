// Points that lie as the columns of a matrix, as the weights of classes [D, C] do, and their gradients.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace dml {

// Whether points [N, D] are the columns of a matrix [D, N] whose rows are contiguous. Python says the same of
// gradients: has_columns in dml_cuda/_ops/fake.py.
inline bool has_columns(const at::Tensor& points) {
    return points.size(0) > 1 && points.size(1) > 1 && points.stride(0) == 1 &&
           points.stride(1) >= points.size(0);
}

// Memory for the gradient of points: rows, or columns where the points are.
inline at::Tensor empty_gradient(const at::Tensor& points, bool columns) {
    return columns ? at::empty({points.size(1), points.size(0)}, points.options()).t()
                   : at::empty(points.sizes(), points.options());
}

// A gradient in rows, as columns where the points are.
inline at::Tensor laid_out_as(const at::Tensor& points, const at::Tensor& gradient) {
    return has_columns(points) && gradient.stride(0) != 1 ? gradient.t().contiguous().t() : gradient;
}

}  // namespace dml
