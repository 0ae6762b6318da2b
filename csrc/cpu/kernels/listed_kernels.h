// Products over pairs given as lists of indices, as a table of function pointers: one table for each scalar
// type and instruction set. The indices must be in range.
#pragma once

#include <cstdint>

namespace dml::cpu {

template <typename T>
struct ListedKernels {
    // out[k] = <x[rows[k]], y[cols[k]]> for k in [from, to). x [N, dim], y [M, dim], contiguous.
    void (*products)(const T* x, const T* y, const int64_t* rows, const int64_t* cols, int64_t from,
                     int64_t to, int64_t dim, T* out);
    // out[r] = sum of weights[k] * points[index[k]] over k in [offsets[r], offsets[r + 1]), for r in
    // [from, to). points [M, dim], out [R, dim], contiguous.
    void (*sums)(const T* weights, const T* points, const int64_t* index, const int64_t* offsets,
                 int64_t from, int64_t to, int64_t dim, T* out);
};

// The table for the instruction set in use.
template <typename T>
const ListedKernels<T>& listed_kernels();

}  // namespace dml::cpu
