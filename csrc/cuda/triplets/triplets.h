// The CUDA side of the ops on triplets: raw pointers, sizes and a stream, for float and double. No torch
// header, and nothing here waits for the device. The similarities of a strip of rows come from outside, as do
// the products of the weights that are left in their place.
#pragma once

#include <cstdint>

#include "core/triplets.h"

#if defined(DML_CUDA_ON_HOST)
#include "../../../tests/emulator/cuda_language.h"
#else
#include <cuda_runtime_api.h>  // for cudaStream_t
#endif

namespace dml::cuda {

// Rows [first, first + rows) against all columns.
template <typename T>
struct TripletStrip {
    T* s;  // [rows, pitch] similarities
    int64_t rows, columns, pitch, first;
    // The columns by label, ascending within one; those of row i's label are [begin[i], end[i]) of them.
    const int64_t* members;         // [columns]
    const int64_t* begin;           // [N]
    const int64_t* end;             // [N]
    const int64_t* own;             // [N] each row's own column, or -1; null: none
    bool square;                    // row i's own column is i
    const int64_t* num_valid_refs;  // only so many columns take part; null: all
};

struct TripletRules {
    TripletTerm term;
    Selection positives, negatives;
    double params[kTripletParams];
    bool euclidean, write;  // write: the weights dL/ds over the similarities, by 1 / d where euclidean
    const int64_t* seed;    // one number, of a draw
};

// Bytes that the kernels below need, for so many rows and columns.
template <typename T>
int64_t triplet_workspace_bytes(int64_t rows, int64_t columns);

// s = -|x - y| from s = <x, y>, in place; x are the strip's rows [rows, dim], y all columns [columns, dim],
// both contiguous, with their squared norms.
template <typename T>
void make_distances(const TripletStrip<T>& strip, const T* x, const T* x_squares, const T* y,
                    const T* y_squares, int64_t dim, cudaStream_t stream);

// Each row's sum [N], counts [N, 2] and gradient by beta [N] (null: none), of the strip's rows. beta: [N], or
// null.
template <typename T>
void triplet_rows(const TripletStrip<T>& strip, const TripletRules& rules, const T* beta, T* sums,
                  int64_t* counts, T* grad_beta, void* workspace, cudaStream_t stream);

// What select finds for the strip's rows [N], or for their pairs [count] of ascending anchors: those rules of
// which `of_positives` is set ask the positives. Overwrites the similarities.
struct SelectedPairs {
    const int64_t *anchors, *positives;  // [count], null: one for each row
    int64_t count;
    bool of_positives;
};
template <typename T>
void select_rows(const TripletStrip<T>& strip, const TripletRules& rules, const SelectedPairs& pairs,
                 int64_t* columns, T* similarities, void* workspace, cudaStream_t stream);

}  // namespace dml::cuda
