// Entry points of the kernels on triplets and ranks: raw pointers, sizes and a stream, for float and double; no torch
// header, no host synchronisation. The caller multiplies: it passes the similarities of a block of rows, and
// multiplies the weights that the kernels leave in their place by the points.
#pragma once

#include <cstdint>

#include "core/ranking.h"
#include "core/triplets.h"

#if defined(DML_CUDA_ON_HOST)
#include "../../../tests/emulator/cuda_language.h"
#else
#include <cuda_runtime_api.h>  // for cudaStream_t
#endif

namespace dml::cuda {

// Rows [first, first + rows) against all columns.
template <typename T>
struct TripletRowBlock {
    T* s;  // [rows, pitch] similarities
    int64_t rows, columns, pitch, first;
    // The columns by label, ascending within a label; those of row i's label are members[begin[i] .. end[i]).
    const int64_t* members;         // [columns]
    const int64_t* begin;           // [N]
    const int64_t* end;             // [N]
    const int64_t* self_index;      // [N] the column that is the same point as the row, or -1; null: none
    bool square;                    // that column is i, for row i
    const int64_t* num_valid_refs;  // one number: the columns in use, from the first; null: all
};

struct TripletRules {
    TripletTerm term;
    Selection positives, negatives;
    double params[kTripletParams];
    bool euclidean;
    bool write;           // the weights dL/ds over the similarities, divided by the distance where euclidean
    const int64_t* seed;  // one number, for drawn negatives
};

struct RankingRules {
    Ranking loss;
    bool possible;  // whether the parameters are numbers that a loss can be computed with
    double temperature, temperature_k;
    double cutoffs[kMostCutoffs];
    int cutoff_count;
    int64_t bins;
    bool euclidean, write;  // as in TripletRules
};

// Bytes of workspace for a block of `rows` rows.
template <typename T>
int64_t triplet_workspace_bytes(int64_t rows, int64_t columns);

// What takes the place of `columns` there for the losses of ranks.
int64_t ranking_space(const RankingRules& rules, int64_t columns);

// s = -|x - y| from s = <x, y>, in place; x [rows, dim] are the block's rows, y [columns, dim] all columns,
// both contiguous; x_squares [rows] and y_squares [columns] their squared norms.
template <typename T>
void make_distances(const TripletRowBlock<T>& row_block, const T* x, const T* x_squares, const T* y,
                    const T* y_squares, int64_t dim, cudaStream_t stream);

// Writes the block's rows of sums [N], counts [N, 2] (terms that are not 0, triplets considered) and
// grad_row_params [N] (null: not wanted). row_params: [N], as the op has them (torch/schemas.h), or null.
template <typename T>
void triplet_rows(const TripletRowBlock<T>& row_block, const TripletRules& rules, const T* row_params,
                  T* sums, int64_t* counts, T* grad_row_params, void* workspace, cudaStream_t stream);

// Writes the block's rows of losses [N], counts [N, 2] (whether the loss is not 0, whether there is a positive)
// and by_params [N, 2], the derivatives by both temperatures (null: not wanted). row_weights: [N], or null.
template <typename T>
void ranking_rows(const TripletRowBlock<T>& row_block, const RankingRules& rules, const double* row_weights,
                  T* losses, int64_t* counts, double* by_params, void* workspace, cudaStream_t stream);

// Selects one column for each of the block's rows [N], or for each of their pairs [count]: a positive where
// of_positives, else a negative. Overwrites the similarities.
struct SelectedPairs {
    bool listed;                         // else one for each row. The pointers of an empty list are null too
    const int64_t *anchors, *positives;  // [count], anchors ascending
    int64_t count;
    bool of_positives;
};
template <typename T>
void select_rows(const TripletRowBlock<T>& row_block, const TripletRules& rules, const SelectedPairs& pairs,
                 int64_t* columns, T* similarities, void* workspace, cudaStream_t stream);

}  // namespace dml::cuda
