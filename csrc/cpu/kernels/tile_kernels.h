// The loops over the pairs of one similarity tile, as a table of function pointers: one table for each scalar
// type, formula and instruction set. The loops see raw pointers only; pairs/ decides which tile is visited
// when.
//
// Rows and columns are sorted by label, so the positives of a row are one run of columns.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels/sparse_tile.h"
#include "losses/list.h"

namespace dml::cpu {

inline constexpr int kMostSide = 128;  // rows and columns of the largest tiles

// One block of similarities, and where it lies in the sorted matrix.
template <typename T>
struct Tile {
    const T* s;  // [rows, cols], rows `pitch` apart
    int64_t pitch;
    int rows, cols;
    int64_t row0, col0;        // global index of the first row and column
    const int32_t* pos_begin;  // [N] the positives of sorted row i are columns
    const int32_t* pos_end;    // [N]   [pos_begin[i], pos_end[i])
    const int32_t* self_col;   // [N] the column that is the same point as row i, or -1; null: no such pairs
    bool both_sides;           // the tile serves its columns as rows too
    int64_t col_line0;         // index of the first column among the lines that have a loss
};

enum class Kinds : int { kNegatives = 1, kPositives = 2, kBoth = 3 };

// What forward knows of every line so far: of every row, and of columns that have a loss too. Separate arrays, because the columns of a tile read them as
// vectors.
template <typename T>
struct RowStates {
    T* neg_above;  // [N] bounds
    T* pos_below;  // [N]
    T* neg_value;  // [N] the value of the negatives' accumulator, once it is complete
};

// What one tile adds to the accumulators of its lines (its rows or its columns): (max, sum) to a log-sum-exp,
// (count, sum) to a sum. The engine merges these parts in the order of the tiles.
template <typename T>
struct LineParts {
    alignas(64) T neg_a[kMostSide];    // max or count
    alignas(64) T neg_b[kMostSide];    // sum
    alignas(64) T max_neg[kMostSide];  // the hardest kept negative
    alignas(64) T pos_a[kMostSide];
    alignas(64) T pos_b[kMostSide];
    alignas(64) T pos_context[kMostSide];
};

template <typename T>
struct TileParts {
    LineParts<T> rows, cols;
};

// What backward needs of every row. The derivatives include the row's upstream gradient.
template <typename T>
struct RowWeights {
    const T* neg_above;  // [N]
    const T* pos_below;  // [N]
    const T* neg_value;  // [N]
    const T* pos_value;  // [N]
    const T* d_neg;      // [N] upstream * d loss / d accumulator of the negatives
    const T* d_pos;      // [N]
};

// Whether an accumulation found parts to merge, and pairs that may have a gradient.
struct Found {
    bool parts, gradient;

    DML_INLINE void operator|=(Found more) {
        parts = parts || more.parts;
        gradient = gradient || more.gradient;
    }
};

template <typename T>
struct TileKernels {
    // s = -|x - y| from s = <x, y>, in place. x [rows, dim], y [cols, dim], strided, with their squared
    // norms.
    void (*distances)(T* s, int64_t pitch, int rows, int cols, const T* x, int64_t x_stride,
                      const T* x_square, const T* y, int64_t y_stride, const T* y_square, int64_t dim);
    // The smallest similarity of the positives of each line, into rows.pos_a and cols.pos_a.
    void (*min_positives)(const Tile<T>&, TileParts<T>&);
    // What the tile's kept pairs of the given kinds add to the accumulators of its lines. count_nonzero: sums
    // count the terms that are not 0, else the kept pairs.
    Found (*accumulate)(const Tile<T>&, const double* params, Kinds, bool count_nonzero, const RowStates<T>&,
                        TileParts<T>&);
    // Merges the parts of n lines into their accumulators: (a, b) and (part_a, part_b) as in LineParts.
    void (*merge)(Accumulator, int n, const T* part_a, const T* part_b, T* a, T* b);
    // weights[i * pitch + j] = sum over the sides of dL/ds_ij, exactly 0 where not kept; divided by |x - y|
    // where euclidean. Returns the number of non-zeros. by_params: null, or [kMaxParams] where the derivatives
    // of the sum over the sides of the tile's terms, each times dL/dterm, are added.
    int64_t (*weights)(const Tile<T>&, const double* params, bool euclidean, const RowWeights<T>&, T* weights,
                       double* by_params);
    // The loss of a row from its accumulators. pos_context: the sum of d pos_term / d context over positives.
    RowDerivatives<T> (*row)(const double* params, const Gathered<T>&, T pos_context);
    // Adds the derivatives of the row's loss by the parameters, for constant accumulators, times the upstream
    // gradient of its parts.
    void (*row_by_params)(const double* params, const Gathered<T>&, const T upstream[2], double* by_params);
    // Terms and derivatives of n pairs of one kind (formula_ops.cpp). context [n]: read with positives.
    void (*terms)(const double* params, bool positives, int64_t n, const T* s, const T* context, T* term,
                  T* derivative, T* by_context);
    // The non-zeros of weights as a SparseTile, into SparseTile::bytes bytes of memory.
    void (*compress)(const T* weights, int64_t pitch, int rows, int cols, int64_t count, void* memory);
    // out[i] += sum_k value_k * x[index_k] for every line. x, out: [., dim], strided.
    void (*add_product)(const typename SparseTile<T>::Lines&, int lines, const T* x, int64_t x_stride,
                        int64_t dim, T* out, int64_t out_stride);

    // What the formula declares (losses/formula.h).
    Accumulator neg, pos;
    bool plus_one, context, pos_in_neg, only_negatives, hinge, log_one_plus;
    NeededPairs needed;
    Count count;
    int parts;
};

// The table for the instruction set in use.
template <typename T>
const TileKernels<T>& tile_kernels(FormulaId formula);

// Names among "baseline", "avx2" and "avx512", slowest first.
std::vector<std::string> available_instruction_sets();
std::string instruction_set();
void set_instruction_set(const std::string& name);

}  // namespace dml::cpu
