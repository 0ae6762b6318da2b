// Points as the tiles want them, sorted, normalised and in the compute type, and the way back for
// their gradient.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "../problem.h"
#include "tasks.h"

namespace dml::cpu {

inline constexpr double kTinyNorm = 1e-12;  // a row no longer than this has similarity 0 to all

// Matrix products take whole blocks of 16: for what is left over beyond them a library may add up in an order
// that depends on the number of threads.
inline int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

template <typename T>
struct PackedPoints {
    at::Tensor x;         // [padded(N), stride] sorted; unit rows when normalised, else as given; then zeros
    at::Tensor inv_norm;  // [N] sorted: 1 / |q|, 0 for tiny rows, 1 when not normalised
    at::Tensor square;    // [N] sorted: |x|^2
    int64_t count, dim;
    // D, and one more where a column of ones follows: the product of weights and points then gives the sums
    // of the weights as well, which distances between rows as they come need.
    int64_t width;
    bool finite = true;  // false: a value, or without normalising a squared norm, overflows or is NaN

    int64_t stride() const { return x.size(1); }
    int64_t padded_width() const { return padded(width); }
    T* row(int64_t i) const { return x.data_ptr<T>() + i * stride(); }
};

// An odd number of cache lines: rows at a power-of-two distance would all fall into the same few sets
// of the first-level cache.
template <typename T>
int64_t row_stride(int64_t dim) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ((padded(dim) + kLine - 1) / kLine | 1) * kLine;
}

// Rows per task, and the work of one.
inline int64_t row_piece(int64_t dim) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(dim, 1)); }
inline int64_t row_work(int64_t dim) { return dim + 16; }

// Rows are short compared with N * N work, so the norm is taken in double: it cannot overflow for any
// finite float input.
template <typename T, typename Input>
bool pack_rows(const Input* source, int64_t source_stride, const int32_t* order, int64_t n,
               const Similarity& how, PackedPoints<T>& points) {
    std::atomic<bool> finite{true};
    const int64_t dim = points.dim, x_stride = points.stride();
    const bool normalize = how.normalize;
    // The square of a distance is at most four times the larger square of a norm.
    const double most = double(std::numeric_limits<T>::max()) / (how.euclidean ? 4 : 1);
    T *x = points.x.template data_ptr<T>(), *inv_norm = points.inv_norm.template data_ptr<T>(),
      *squares = points.square.template data_ptr<T>();
    for_pieces(n, row_piece(dim), n * row_work(dim), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const Input* q = source + order[i] * source_stride;
            T* out = x + i * x_stride;
            double square = 0, largest = 0;
#pragma omp simd reduction(+ : square)
            for (int64_t d = 0; d < dim; ++d) {
                out[d] = static_cast<T>(q[d]);
                const double value = out[d];
                square += value * value;
            }
            if (!std::isfinite(square)) {  // a true inf or NaN, or doubles too large to square
                square = 0;
                for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::abs(double(out[d])));
                for (int64_t d = 0; d < dim; ++d) square += (out[d] / largest) * (out[d] / largest);
            } else {
                largest = 1;
            }
            const double norm = largest * std::sqrt(square);
            const bool fits = normalize ? std::isfinite(norm) : norm * norm <= most;
            if (!fits) finite.store(false, std::memory_order_relaxed);
            const T scale = !normalize ? T(1) : norm > kTinyNorm ? T(1 / norm) : T(0);
            inv_norm[i] = scale;
            if (normalize) {
                for (int64_t d = 0; d < dim; ++d) out[d] *= scale;
            }
            std::fill(out + dim, out + x_stride, T(0));
            if (points.width > dim) out[dim] = T(1);
            if (!how.euclidean) continue;
            square = 0;  // of what is stored
#pragma omp simd reduction(+ : square)
            for (int64_t d = 0; d < dim; ++d) square += double(out[d]) * double(out[d]);
            squares[i] = static_cast<T>(square);
        }
    });
    return finite.load();
}

template <typename T>
PackedPoints<T> pack(const at::Tensor& embeddings, const int32_t* order, const Similarity& how) {
    const at::Tensor source =
        embeddings.size(1) > 1 && embeddings.stride(1) != 1 ? embeddings.contiguous() : embeddings;
    const int64_t n = source.size(0), dim = source.size(1);
    const int64_t width = dim + (how.euclidean && !how.normalize ? 1 : 0);
    const auto options = source.options().dtype(c10::CppTypeToScalarType<T>::value);
    PackedPoints<T> points{at::empty({padded(n), row_stride<T>(width)}, options),
                           at::empty({n}, options),
                           at::empty({how.euclidean ? n : 0}, options),
                           n,
                           dim,
                           width};
    std::fill(points.row(n), points.row(padded(n)), T(0));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source.scalar_type(), "pack", [&] {
        points.finite = pack_rows<T, scalar_t>(source.const_data_ptr<scalar_t>(), source.stride(0), order, n,
                                               how, points);
    });
    return points;
}

// From the gradient G with respect to the packed rows to that of the embeddings:
// dq = (G - (x . G) x) / |q| for unit rows, G - (sum of the weights) x for distances between rows as they
// come, G itself for the dot product.
template <typename T, typename Output>
void unpack_rows(const T* gradient, const PackedPoints<T>& points, const int32_t* order, bool normalize,
                 Output* out) {
    const int64_t n = points.count, dim = points.dim, width = points.width, pitch = points.padded_width();
    const T* inv_norm = points.inv_norm.template const_data_ptr<T>();
    for_pieces(n, row_piece(dim), n * row_work(dim), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const T *g = gradient + i * pitch, *x = points.row(i);
            Output* q = out + order[i] * dim;
            T along = width > dim ? g[dim] : T(0);
            if (normalize) {
#pragma omp simd reduction(+ : along)
                for (int64_t d = 0; d < dim; ++d) along += g[d] * x[d];
            }
            const T scale = inv_norm[i];
            for (int64_t d = 0; d < dim; ++d) q[d] = static_cast<Output>((g[d] - along * x[d]) * scale);
        }
    });
}

template <typename T>
at::Tensor unpack_gradient(const at::Tensor& gradient, const PackedPoints<T>& points, const int32_t* order,
                           const at::Tensor& like, bool normalize) {
    at::Tensor out = at::empty(like.sizes(), like.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "unpack_gradient", [&] {
        unpack_rows(gradient.const_data_ptr<T>(), points, order, normalize, out.data_ptr<scalar_t>());
    });
    return out;
}

}  // namespace dml::cpu
