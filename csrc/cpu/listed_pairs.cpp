// The ops on pairs given as lists: their similarities, what their weights add to the gradient, and the
// log-sum-exp of each row's. The cost is that of the pairs listed, not of all.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "../listed_ops.h"
#include "listed_kernels.h"

namespace dml::cpu {
namespace {

using at::Tensor;

void check_range(const Tensor& index, int64_t size, const char* name) {
    const int64_t* at = index.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < index.numel(); ++k) {
        TORCH_CHECK_INDEX(at[k] >= 0 && at[k] < size, name, ": expected indices below ", size, ", got ",
                          at[k]);
    }
}

void check_offsets(const Tensor& offsets, int64_t pairs) {
    const int64_t* at = offsets.const_data_ptr<int64_t>();
    const int64_t rows = offsets.numel() - 1;
    bool good = at[0] == 0 && at[rows] == pairs;
    for (int64_t r = 0; r < rows; ++r) good = good && at[r] <= at[r + 1];
    TORCH_CHECK_VALUE(good, "offsets: expected to rise from 0 to ", pairs);
}

// Elements of work that are worth a thread.
int64_t grain(int64_t work) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(work, 1)); }

Tensor pair_products(const Tensor& x, const Tensor& y, const Tensor& rows, const Tensor& cols,
                     const Tensor& row_offsets) {
    check_products(x, y, rows, cols, row_offsets);
    check_range(rows, x.size(0), "rows");
    check_range(cols, y.size(0), "cols");
    const int64_t dim = x.size(1);
    Tensor out = at::empty({rows.numel()}, x.options());
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "pair_products", [&] {
        const auto& kernels = listed_kernels<scalar_t>();
        at::parallel_for(0, rows.numel(), grain(dim), [&](int64_t from, int64_t to) {
            kernels.products(x.const_data_ptr<scalar_t>(), y.const_data_ptr<scalar_t>(),
                             rows.const_data_ptr<int64_t>(), cols.const_data_ptr<int64_t>(), from, to, dim,
                             out.data_ptr<scalar_t>());
        });
    });
    return out;
}

Tensor pair_sums(const Tensor& weights, const Tensor& points, const Tensor& index, const Tensor& offsets) {
    check_sums(weights, points, index, offsets);
    check_range(index, points.size(0), "index");
    check_offsets(offsets, index.numel());
    const int64_t rows = offsets.numel() - 1, dim = points.size(1);
    Tensor out = at::empty({rows, dim}, points.options());
    const int64_t work = rows > 0 ? dim * (1 + index.numel() / rows) : 1;
    AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "pair_sums", [&] {
        const auto& kernels = listed_kernels<scalar_t>();
        at::parallel_for(0, rows, grain(work), [&](int64_t from, int64_t to) {
            kernels.sums(weights.const_data_ptr<scalar_t>(), points.const_data_ptr<scalar_t>(),
                         index.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(), from, to, dim,
                         out.data_ptr<scalar_t>());
        });
    });
    return out;
}

// Summed in double: a segment may be long, and a sum of its own rounding errors.
template <typename T>
T logsumexp(const T* logits, int64_t count, bool plus_one) {
    T largest = plus_one ? T(0) : -std::numeric_limits<T>::infinity();
    for (int64_t k = 0; k < count; ++k) largest = logits[k] > largest ? logits[k] : largest;
    const T shift = std::isinf(largest) ? T(0) : largest;
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += std::exp(logits[k] - shift);
    if (plus_one && shift == T(0)) return static_cast<T>(std::log1p(sum));  // accurate for tiny sums too
    if (plus_one) sum += std::exp(-shift);
    return static_cast<T>(shift + std::log(sum));
}

Tensor segment_logsumexp(const Tensor& logits, const Tensor& offsets, bool plus_one) {
    check_segments(logits, offsets);
    check_offsets(offsets, logits.numel());
    const int64_t rows = offsets.numel() - 1;
    Tensor out = at::empty({rows}, logits.options());
    const int64_t work = rows > 0 ? 16 * (1 + logits.numel() / rows) : 1;
    AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "segment_logsumexp", [&] {
        const scalar_t* from_logits = logits.const_data_ptr<scalar_t>();
        const int64_t* at = offsets.const_data_ptr<int64_t>();
        scalar_t* to_rows = out.data_ptr<scalar_t>();
        at::parallel_for(0, rows, grain(work), [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r)
                to_rows[r] = logsumexp(from_logits + at[r], at[r + 1] - at[r], plus_one);
        });
    });
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("pair_products", &pair_products);
    m.impl("pair_sums", &pair_sums);
    m.impl("segment_logsumexp", &segment_logsumexp);
}

}  // namespace dml::cpu
