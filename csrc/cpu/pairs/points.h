// Packed points: sorted by label, normalised, in the compute type; and the backward of that for their
// gradient.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/problem.h"
#include "core/tiny_norm.h"
#include "cpu/kernels/product_kernels.h"
#include "cpu/tasks.h"
#include "torch/columns.h"

namespace dml::cpu {

// Matrix products work on whole blocks of 16.
inline int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }

// An odd number of cache lines: rows a power of two apart would share a few sets of the first-level cache.
template <typename T>
int64_t row_stride(int64_t dim) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ((padded(dim) + kLine - 1) / kLine | 1) * kLine;
}

// Memory as a matrix.
template <typename T>
at::Tensor matrix(T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    return at::from_blob(data, {rows, cols}, {row_stride, col_stride},
                         at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
}

// Memory for numbers, aligned like a tensor's but cheaper to make than one.
template <typename T>
class Numbers {
   public:
    T* data() const { return static_cast<T*>(memory_.get()); }
    // Where it grows, all numbers become uninitialised.
    void reserve(int64_t size) {
        if (size <= size_) return;
        memory_ = c10::GetCPUAllocator()->allocate(size * sizeof(T));
        size_ = size;
    }

   private:
    c10::DataPtr memory_;
    int64_t size_ = 0;
};

// Rows per task, and the work for a row.
inline int64_t row_piece(int64_t dim) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(dim, 1)); }
inline int64_t row_work(int64_t dim) { return dim + 16; }
// Points per task where they are columns: at least four cache lines of each dimension.
inline int64_t column_piece(int64_t dim) { return std::max<int64_t>(row_piece(dim), 64); }

// Whether points lie as the columns of a matrix and are wanted in that order, as the weights of classes are.
// Others that are not rows are copied to rows first.
template <typename T>
bool are_ordered_columns(const at::Tensor& points, const int32_t* order) {
    if (!has_columns(points) || points.scalar_type() != c10::CppTypeToScalarType<T>::value) return false;
    for (int64_t i = 0; i < points.size(0); ++i) {
        if (order[i] != i) return false;
    }
    return true;
}

// The points of one side. A window of them is packed at a time: all, or those of a tile group.
template <typename T>
class PackedPoints {
   public:
    const int64_t dim;
    // D, plus one for a column of ones with unnormalised distances, whose gradient needs the sums of the
    // weights: the product of weights and points then gives them too.
    const int64_t width;
    bool finite = true;  // false: a value, or without normalisation a squared norm, overflows or is NaN

    PackedPoints(const at::Tensor& embeddings, const int32_t* order, const Similarity& similarity)
        : dim(embeddings.size(1)),
          width(dim + (similarity.euclidean && !similarity.normalize ? 1 : 0)),
          by_columns_(are_ordered_columns<T>(embeddings, order)),
          source_(dim > 1 && embeddings.stride(1) != 1 && !by_columns_ ? embeddings.contiguous()
                                                                       : embeddings),
          order_(order),
          similarity_(similarity) {}

    int64_t size() const { return source_.size(0); }
    int64_t stride() const { return row_stride<T>(width); }
    int64_t padded_width() const { return padded(width); }

    // Packs the sorted points [first, last), unless they are packed already.
    void show(int64_t first, int64_t last);

    // A packed point: a unit row if normalised, else as given, padded with zeros. Rows of zeros after the
    // last point fill up a block of 16.
    T* row(int64_t i) const { return x_.data() + (i - first_) * stride(); }
    const T* square(int64_t i) const { return square_.data() + (i - first_); }  // |x|^2
    T inv_norm(int64_t i) const {  // 1 / |q|, 0 for tiny rows, 1 if not normalised
        return inv_norm_.data()[i - first_];
    }
    int32_t place(int64_t i) const { return order_[i]; }
    bool normalized() const { return similarity_.normalize; }
    bool by_columns() const { return by_columns_; }  // and place(i) is i

    at::TensorOptions options() const { return source_.options().dtype(c10::CppTypeToScalarType<T>::value); }

   private:
    template <typename Input>
    bool pack_rows(const Input* source, int64_t source_stride, const int32_t* order, int64_t n);
    void pack_columns(int64_t first, int64_t count, T* x) const;

    const bool by_columns_;
    const at::Tensor source_;
    const int32_t* const order_;
    const Similarity similarity_;
    int64_t first_ = 0, last_ = -1;
    Numbers<T> x_;         // [padded(window), stride]
    Numbers<T> inv_norm_;  // [window]
    Numbers<T> square_;    // [window] squared norms of the packed rows
};

template <typename T>
void PackedPoints<T>::show(int64_t first, int64_t last) {
    if (first == first_ && last == last_) return;
    const int64_t n = last - first;
    x_.reserve(padded(n) * stride());
    inv_norm_.reserve(n);
    if (similarity_.euclidean) square_.reserve(n);
    first_ = first;
    last_ = last;
    std::fill(row(last), row(first + padded(n)), T(0));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source_.scalar_type(), "pack", [&] {
        finite &= pack_rows(source_.const_data_ptr<scalar_t>(), source_.stride(0), order_ + first, n);
    });
}

// The points [first, first + count) to rows, not yet normalised.
template <typename T>
void PackedPoints<T>::pack_columns(int64_t first, int64_t count, T* x) const {
    product_kernels<T>().transpose(dim, count, source_.const_data_ptr<T>() + first, source_.stride(1), x,
                                   stride());
}

// Norms are computed in double, at a small cost beside the N^2 pairs: they cannot overflow for finite floats.
template <typename T>
template <typename Input>
bool PackedPoints<T>::pack_rows(const Input* source, int64_t source_stride, const int32_t* order, int64_t n) {
    std::atomic<bool> finite{true};
    const ProductKernels<T>& kernels = product_kernels<T>();
    const Similarity how = similarity_;
    const int64_t dim = this->dim, width = this->width, x_stride = stride();
    const bool normalize = how.normalize;
    // The square of a distance is at most four times the larger square of a norm.
    const double most = double(std::numeric_limits<T>::max()) / (how.euclidean ? 4 : 1);
    T *x = x_.data(), *inv_norm = inv_norm_.data(), *squares = square_.data();
    const int64_t piece = by_columns_ ? column_piece(dim) : row_piece(dim);
    for_pieces(n, piece, n * row_work(dim), [&](int64_t from, int64_t to) {
        if (by_columns_) pack_columns(first_ + from, to - from, x + from * x_stride);
        for (int64_t i = from; i < to; ++i) {
            T* out = x + i * x_stride;
            if (!by_columns_) {
                const Input* q = source + order[i] * source_stride;
                for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<T>(q[d]);
            }
            double square = kernels.square(dim, out), largest = 0;
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
            if (normalize) kernels.scale(dim, scale, out);
            std::fill(out + dim, out + x_stride, T(0));
            if (width > dim) out[dim] = T(1);
            if (how.euclidean) squares[i] = static_cast<T>(kernels.square(dim, out));
        }
    });
    return finite.load();
}

// From the gradient G [count, padded width] of the packed rows from `first` on to that of the embeddings:
// dq = (G - (x . G) x) / |q| for unit rows, G - (sum of the weights) x for unnormalised distances, G for the
// dot product.
template <typename T, typename Output>
void unpack_rows(const T* gradient, const PackedPoints<T>& points, int64_t first, int64_t count,
                 Output* out) {
    const int64_t dim = points.dim, width = points.width, pitch = points.padded_width();
    const ProductKernels<T>& kernels = product_kernels<T>();
    for_pieces(count, row_piece(dim), count * row_work(dim), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const T *g = gradient + i * pitch, *x = points.row(first + i);
            Output* q = out + points.place(first + i) * dim;
            T along = width > dim ? g[dim] : T(0);
            if (points.normalized()) along += kernels.dot(dim, g, x);
            const T scale = points.inv_norm(first + i);
            if constexpr (std::is_same_v<T, Output>) {
                kernels.across(dim, g, along, x, scale, q);
                continue;
            }
            for (int64_t d = 0; d < dim; ++d) q[d] = static_cast<Output>((g[d] - along * x[d]) * scale);
        }
    });
}

// The same where points and their gradient `out` [N, D] are columns.
template <typename T>
void unpack_columns(const T* gradient, const PackedPoints<T>& points, int64_t first, int64_t count,
                    const at::Tensor& out) {
    const int64_t dim = points.dim, width = points.width, pitch = points.padded_width();
    const ProductKernels<T>& kernels = product_kernels<T>();
    T* const to = out.data_ptr<T>() + first;
    for_pieces(count, column_piece(dim), count * row_work(dim), [&](int64_t from, int64_t end) {
        Numbers<T> rows;
        rows.reserve((end - from) * pitch);
        for (int64_t i = from; i < end; ++i) {
            const T *g = gradient + i * pitch, *x = points.row(first + i);
            T along = width > dim ? g[dim] : T(0);
            if (points.normalized()) along += kernels.dot(dim, g, x);
            kernels.across(dim, g, along, x, points.inv_norm(first + i), rows.data() + (i - from) * pitch);
        }
        kernels.transpose(end - from, dim, rows.data(), pitch, to + from, out.stride(1));
    });
}

// Writes the rows of `out` [N, D] that belong to those points. It may have columns where points are columns.
template <typename T>
void unpack(const T* gradient, const PackedPoints<T>& points, int64_t first, int64_t count,
            const at::Tensor& out) {
    if (has_columns(out)) return unpack_columns(gradient, points, first, count, out);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "unpack", [&] {
        unpack_rows(gradient, points, first, count, out.data_ptr<scalar_t>());
    });
}

// Zeros those rows of `out`, for points without a gradient.
template <typename T>
void clear_rows(const PackedPoints<T>& points, int64_t first, int64_t count, const at::Tensor& out) {
    if (has_columns(out)) {
        out.narrow(0, first, count).zero_();
        return;
    }
    const int64_t bytes = out.size(1) * out.element_size();
    auto* data = static_cast<uint8_t*>(out.data_ptr());
    for_pieces(count, row_piece(points.dim), count * row_work(points.dim) / 4, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) std::memset(data + points.place(first + i) * bytes, 0, bytes);
    });
}

}  // namespace dml::cpu
