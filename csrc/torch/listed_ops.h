// What the implementations of the ops on listed pairs share on every device: the checks of shapes and
// types. Whether an index is in range is for the device to see.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace dml {

inline void check_matrix(const at::Tensor& x, const char* name) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous(), name, ": expected a contiguous matrix, got shape ",
                      x.sizes());
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, name,
                     ": expected float32 or float64, got ", x.scalar_type());
}

inline void check_vector(const at::Tensor& x, at::ScalarType dtype, const at::Tensor& beside,
                         const char* name) {
    TORCH_CHECK_VALUE(x.dim() == 1 && x.is_contiguous(), name, ": expected a contiguous vector, got shape ",
                      x.sizes());
    TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.device() == beside.device(), name, ": expected on ", beside.device(), ", got on ",
                      x.device());
}

inline void check_offsets_shape(const at::Tensor& offsets, const at::Tensor& beside) {
    check_vector(offsets, at::kLong, beside, "offsets");
    TORCH_CHECK_VALUE(offsets.numel() > 0, "offsets: expected one more than rows, got none");
}

inline void check_products(const at::Tensor& x, const at::Tensor& y, const at::Tensor& rows,
                           const at::Tensor& cols, const at::Tensor& row_offsets) {
    check_matrix(x, "x");
    check_matrix(y, "y");
    TORCH_CHECK_TYPE(x.scalar_type() == y.scalar_type(), "y: expected ", x.scalar_type(), ", got ",
                     y.scalar_type());
    TORCH_CHECK_VALUE(x.device() == y.device(), "y: expected on ", x.device(), ", got on ", y.device());
    TORCH_CHECK_VALUE(x.size(1) == y.size(1), "y: expected ", x.size(1), " columns, got ", y.size(1));
    check_vector(rows, at::kLong, x, "rows");
    check_vector(cols, at::kLong, x, "cols");
    TORCH_CHECK_VALUE(rows.numel() == cols.numel(), "cols: expected ", rows.numel(), " indices as rows, got ",
                      cols.numel());
    check_offsets_shape(row_offsets, x);
    TORCH_CHECK_VALUE(row_offsets.numel() == x.size(0) + 1, "row_offsets: expected ", x.size(0) + 1,
                      " numbers, got ", row_offsets.numel());
}

inline void check_sums(const at::Tensor& weights, const at::Tensor& points, const at::Tensor& index,
                       const at::Tensor& offsets) {
    check_matrix(points, "points");
    check_vector(weights, points.scalar_type(), points, "weights");
    check_vector(index, at::kLong, points, "index");
    TORCH_CHECK_VALUE(weights.numel() == index.numel(), "index: expected ", weights.numel(),
                      " indices as weights, got ", index.numel());
    check_offsets_shape(offsets, points);
}

inline void check_segments(const at::Tensor& logits, const at::Tensor& offsets) {
    TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble,
                     "logits: expected float32 or float64, got ", logits.scalar_type());
    check_vector(logits, logits.scalar_type(), logits, "logits");
    check_offsets_shape(offsets, logits);
}

inline void check_softmax(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& value,
                          const at::Tensor& offsets) {
    check_segments(logits, offsets);
    check_vector(grad, logits.scalar_type(), logits, "grad");
    check_vector(value, logits.scalar_type(), logits, "value");
    TORCH_CHECK_VALUE(grad.numel() == offsets.numel() - 1 && value.numel() == grad.numel(),
                      "grad, value: expected ", offsets.numel() - 1, " numbers, got ", grad.numel(), " and ",
                      value.numel());
}

}  // namespace dml
