// The ops on listed pairs: similarities, sums of weighted points, log-sum-exps of segments, and sorting.
// Their cost depends on the number of listed pairs, not of all pairs.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/kernels/listed_kernels.h"
#include "cpu/sort.h"
#include "cpu/tasks.h"
#include "torch/listed_ops.h"

namespace dml::cpu {
namespace {

using at::Tensor;

// Pairs per task.
constexpr int64_t kPairPiece = 1 << 14;

void check_range(const Tensor& index, int64_t size, const char* name) {
    const int64_t* at = index.const_data_ptr<int64_t>();
    const int64_t count = index.numel();
    std::atomic<bool> good{true};
    for_pieces(count, kPairPiece, count / 2, [&](int64_t from, int64_t to) {
        bool here = true;
        for (int64_t k = from; k < to; ++k) here = here && at[k] >= 0 && at[k] < size;
        if (!here) good.store(false, std::memory_order_relaxed);
    });
    if (good) return;
    const int64_t* wrong = std::find_if(at, at + count, [&](int64_t k) { return k < 0 || k >= size; });
    TORCH_CHECK_INDEX(false, name, ": expected indices below ", size, ", got ", *wrong);
}

void check_offsets(const Tensor& offsets, int64_t pairs) {
    const int64_t* at = offsets.const_data_ptr<int64_t>();
    const int64_t rows = offsets.numel() - 1;
    std::atomic<bool> good{at[0] == 0 && at[rows] == pairs};
    for_pieces(rows, kPairPiece, rows / 2, [&](int64_t from, int64_t to) {
        bool here = true;
        for (int64_t r = from; r < to; ++r) here = here && at[r] <= at[r + 1];
        if (!here) good.store(false, std::memory_order_relaxed);
    });
    TORCH_CHECK_VALUE(good, "offsets: expected to rise from 0 to ", pairs);
}

// Items per task when one takes `work` steps.
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
        for_pieces(rows.numel(), grain(dim), rows.numel() * dim, [&](int64_t from, int64_t to) {
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
        for_pieces(rows, grain(work), rows * work, [&](int64_t from, int64_t to) {
            kernels.sums(weights.const_data_ptr<scalar_t>(), points.const_data_ptr<scalar_t>(),
                         index.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(), from, to, dim,
                         out.data_ptr<scalar_t>());
        });
    });
    return out;
}

// Sums in double, as a segment may be long.
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
        for_pieces(rows, grain(work), rows * work, [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r)
                to_rows[r] = logsumexp(from_logits + at[r], at[r + 1] - at[r], plus_one);
        });
    });
    return out;
}

Tensor segment_softmax(const Tensor& grad, const Tensor& logits, const Tensor& value, const Tensor& offsets) {
    check_softmax(grad, logits, value, offsets);
    check_offsets(offsets, logits.numel());
    const int64_t rows = offsets.numel() - 1;
    Tensor out = at::empty_like(logits);
    const int64_t work = rows > 0 ? 16 * (1 + logits.numel() / rows) : 1;
    AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "segment_softmax", [&] {
        const scalar_t* from_logits = logits.const_data_ptr<scalar_t>();
        const int64_t* at = offsets.const_data_ptr<int64_t>();
        scalar_t* to = out.data_ptr<scalar_t>();
        for_pieces(rows, grain(work), rows * work, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                const scalar_t scale = grad.const_data_ptr<scalar_t>()[r];
                const scalar_t lse = value.const_data_ptr<scalar_t>()[r];
                // All logits -inf: the weights are 0, not NaN.
                const scalar_t shift = lse == -std::numeric_limits<scalar_t>::infinity() ? scalar_t(0) : lse;
                for (int64_t k = at[r]; k < at[r + 1]; ++k) to[k] = scale * std::exp(from_logits[k] - shift);
            }
        });
    });
    return out;
}

// Returns [count + 1], where each of `count` ascending keys begins; key(k) is that of pair k.
template <typename Key>
Tensor begins(int64_t pairs, int64_t count, const at::TensorOptions& options, const Key& key) {
    Tensor offsets = at::empty({count + 1}, options);
    int64_t* at = offsets.data_ptr<int64_t>();
    // Pair k writes the keys after that of pair k - 1, up to its own. The end writes those after the last
    // pair.
    for_pieces(pairs + 1, kPairPiece, pairs + count, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) {
            const int64_t first = k == 0 ? 0 : key(k - 1) + 1, last = k == pairs ? count : key(k);
            for (int64_t i = first; i <= last; ++i) at[i] = k;
        }
    });
    return offsets;
}

std::tuple<Tensor, Tensor> column_order(const Tensor& cols, int64_t m) {
    check_vector(cols, at::kLong, cols, "cols");
    check_range(cols, m, "cols");
    const int64_t pairs = cols.numel();
    const int64_t* col = cols.const_data_ptr<int64_t>();
    const int shift = bits_of(pairs);
    std::vector<uint64_t> keys(pairs);  // column, position
    for_pieces(pairs, kPairPiece, pairs, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) keys[k] = uint64_t(col[k]) << shift | uint64_t(k);
    });
    sort_keys(keys, shift, shift + bits_of(m));
    Tensor order = at::empty({pairs}, cols.options());
    int64_t* to_order = order.data_ptr<int64_t>();
    const uint64_t mask = (uint64_t(1) << shift) - 1;
    for_pieces(pairs, kPairPiece, pairs, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) to_order[k] = static_cast<int64_t>(keys[k] & mask);
    });
    return {order, begins(pairs, m, cols.options(), [&](int64_t k) { return int64_t(keys[k] >> shift); })};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pair_sort(const Tensor& rows, const Tensor& cols, int64_t n,
                                                     int64_t m) {
    check_vector(rows, at::kLong, rows, "rows");
    check_vector(cols, at::kLong, rows, "cols");
    TORCH_CHECK_VALUE(rows.numel() == cols.numel(), "cols: expected ", rows.numel(), " indices as rows, got ",
                      cols.numel());
    check_range(rows, n, "rows");
    check_range(cols, m, "cols");
    const int64_t pairs = rows.numel();
    const int64_t *row = rows.const_data_ptr<int64_t>(), *col = cols.const_data_ptr<int64_t>();
    const int shift = bits_of(m);
    std::vector<uint64_t> keys(pairs);  // row, column
    std::atomic<bool> sorted{true};     // as a miner lists them
    for_pieces(pairs, kPairPiece, pairs, [&](int64_t from, int64_t to) {
        const auto key = [&](int64_t k) { return uint64_t(row[k]) << shift | uint64_t(col[k]); };
        bool ascending = true;
        for (int64_t k = from; k < to; ++k) {
            keys[k] = key(k);
            ascending = ascending && (k == 0 || key(k - 1) <= keys[k]);
        }
        if (!ascending) sorted.store(false, std::memory_order_relaxed);
    });
    if (!sorted) sort_keys(keys, 0, shift + bits_of(n));
    Tensor sorted_rows = at::empty({pairs}, rows.options()), sorted_cols = at::empty({pairs}, rows.options());
    Tensor fresh = at::empty({pairs}, rows.options().dtype(at::kBool));
    int64_t *to_row = sorted_rows.data_ptr<int64_t>(), *to_col = sorted_cols.data_ptr<int64_t>();
    bool* is_fresh = fresh.data_ptr<bool>();
    const uint64_t mask = (uint64_t(1) << shift) - 1;
    for_pieces(pairs, kPairPiece, pairs, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) {
            to_row[k] = static_cast<int64_t>(keys[k] >> shift);
            to_col[k] = static_cast<int64_t>(keys[k] & mask);
            is_fresh[k] = k == 0 || keys[k] != keys[k - 1];
        }
    });
    const Tensor offsets = begins(pairs, n, rows.options(), [&](int64_t k) { return to_row[k]; });
    return {sorted_rows, sorted_cols, offsets, fresh};
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("pair_products", &pair_products);
    m.impl("pair_sums", &pair_sums);
    m.impl("segment_logsumexp", &segment_logsumexp);
    m.impl("segment_softmax", &segment_softmax);
    m.impl("pair_sort", &pair_sort);
    m.impl("column_order", &column_order);
}

}  // namespace dml::cpu
