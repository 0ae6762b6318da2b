// Matrix products of tile size, and loops over the dimensions of a point, as a table of function pointers:
// one table for each scalar type and instruction set. BLAS libraries spend much of such small products on
// calls and packing, and their order of summation may depend on the number of threads.
//
// Here every element is summed in the order of the inner dimension, in blocks of fixed length: it depends on
// its row and column alone.
#pragma once

#include <cstdint>

namespace dml::cpu {

// A matrix whose element (i, k) lies at data[i * row + k * col].
template <typename T>
struct Strided {
    const T* data;
    int64_t row, col;
};

template <typename T>
struct ProductKernels {
    // s[i * pitch + j] = <x_i, y_j>; x: rows of `dim` numbers, y likewise. rows and cols: multiples of 16.
    void (*similarities)(int64_t rows, int64_t cols, int64_t dim, const T* x, int64_t x_stride, const T* y,
                         int64_t y_stride, T* s, int64_t pitch);
    // out[i * out_stride + d] += sum over k of w(i, k) * x[k * x_stride + d]. lines and dims: multiples
    // of 16. w is contiguous along one of its dimensions.
    void (*add)(int64_t lines, int64_t dims, int64_t inner, const Strided<T>& w, const T* x, int64_t x_stride,
                T* out, int64_t out_stride);
    // to[j * to_stride + i] = from[i * from_stride + j] for i below rows and j below cols.
    void (*transpose)(int64_t rows, int64_t cols, const T* from, int64_t from_stride, T* to,
                      int64_t to_stride);
    // For rows of n numbers: the sum of squares; x *= factor; <x, y>; out = (g - along * x) * factor.
    double (*square)(int64_t n, const T* x);
    void (*scale)(int64_t n, T factor, T* x);
    T (*dot)(int64_t n, const T* x, const T* y);
    void (*across)(int64_t n, const T* g, T along, const T* x, T factor, T* out);
};

// The table for the instruction set in use.
template <typename T>
const ProductKernels<T>& product_kernels();

}  // namespace dml::cpu
