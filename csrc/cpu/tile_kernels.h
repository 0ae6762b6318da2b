// The loops over the pairs of one similarity tile, behind a table of function pointers: one table
// for each scalar type, loss and instruction set. They see raw pointers only; which tile to visit
// when, and the matrix products, belong to the engine (pair_loss.cpp).
//
// Rows and columns are sorted by label, so the positives of a row are one run of columns.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../row_stats.h"

namespace dml::cpu {

inline constexpr int kTile = 128;  // rows and columns of a tile

// One block of similarities, and where it lies in the sorted matrix.
template <typename T>
struct Tile {
    const T* s;  // [rows, cols], contiguous
    int rows, cols;
    int64_t row0, col0;        // global index of the first row and column
    const int32_t* pos_begin;  // [N] the positives of sorted row i are columns
    const int32_t* pos_end;    // [N]   [pos_begin[i], pos_end[i])
    const int32_t* own;        // [N] the column that is row i's own point, or -1; null where there is none
    bool both_sides;           // the tile serves its columns as rows too (by symmetry)
};

enum class Kinds : int { kNegatives = 1, kPositives = 2, kBoth = 3 };

// What the forward pass knows of every row so far.
template <typename T>
struct RowState {
    Bounds<T> bounds;
    T max_neg = -infinity<T>();  // the hardest kept negative
    LogSumExp<T> pos, neg;
};

// What the backward pass needs of every row, as separate arrays because the columns of a tile read
// them as vectors. Weights already hold the row's upstream gradient.
template <typename T>
struct RowWeights {
    const T* neg_above;   // [N]
    const T* pos_below;   // [N]
    const T* lse_neg;     // [N]
    const T* lse_pos;     // [N]
    const T* weight_neg;  // [N] upstream * dL/dlse_neg
    const T* weight_pos;  // [N] upstream * dL/dlse_pos
};

// The non-zeros of a weight tile, by row or by column.
template <typename T>
struct SparseTile {
    int start[kTile + 1];          // [lines + 1]
    uint8_t index[kTile * kTile];  // position across the line
    T value[kTile * kTile];
};

template <typename T>
struct TileKernels {
    // min_pos[i] = min(min_pos[i], s_ij) over the tile's positives, for rows and, if both_sides, columns.
    void (*min_positives)(const Tile<T>&, T* min_pos);
    // Adds the tile's kept pairs of the given kinds to its rows' state. Returns whether any was kept.
    bool (*accumulate)(const Tile<T>&, const double* params, Kinds, RowState<T>* state);
    // weights[i][j] = sum over the sides of dL/ds_ij, exactly 0 where not kept. Returns the number of
    // non-zeros.
    int64_t (*weights)(const Tile<T>&, const double* params, const RowWeights<T>&, T* weights);
    // The row's loss and the derivatives with respect to its two log-sum-exps.
    T (*loss)(const double* params, T lse_pos, T lse_neg);
    PosNeg<T> (*dloss_dlse)(const double* params, T lse_pos, T lse_neg);
    // The non-zeros of weights by row and by column.
    void (*compress)(const T* weights, int rows, int cols, SparseTile<T>& by_row, SparseTile<T>& by_col);
    // out[i] += sum_k value_k * x[index_k] for every line of the sparse tile. x, out: [., dim], strided.
    void (*add_product)(const SparseTile<T>&, int lines, const T* x, int64_t x_stride, int64_t dim, T* out,
                        int64_t out_stride);
    bool counts_one, needs_both;
};

// The table for the instruction set in use.
template <typename T>
const TileKernels<T>& tile_kernels(PairLoss loss);

// Names among "baseline", "avx2" and "avx512", slowest first.
std::vector<std::string> available_instruction_sets();
std::string instruction_set();
void set_instruction_set(const std::string& name);

}  // namespace dml::cpu
