// The loops of triplet and ranking losses over a row's similarities and over blocks of a matrix of them, as a
// table of function pointers: one table for each scalar type and instruction set. A column that is not a
// negative of the row holds NaN.
#pragma once

#include <cstdint>

#include "core/ranking.h"
#include "core/triplets.h"

namespace dml::cpu {

// Columns per partial sum of draw weights.
inline constexpr int64_t kDrawBlock = 64;

// Columns per sweep: their weights stay in the first-level cache and counts in T are exact.
inline constexpr int64_t kSweep = 1024;

// With at most so many positives, each is compared with every negative; with more, runs of them are searched.
inline constexpr int64_t kFewPositives = 48;

// The triplets of one row: all its negatives with its chosen positives.
template <typename T>
struct RowTriplets {
    T* s;  // [m] similarities; out: dL/ds of the negatives, by 1 / d where euclidean
    int64_t m;
    const T* positives;  // [count] distances of the positives
    int64_t count;
    int64_t negatives;      // columns that are not NaN
    bool interval;          // whether the gap is bounded
    bool euclidean, write;  // write: whether the weights are wanted
    TripletParams<T> params;
    T beta;
    // Null unless runs of positives are searched. Then positives ascend, padded with +inf to twice the
    // largest power of two in `count`; prefix holds the sums of the first k of them, steps zeros.
    const double* prefix;  // [count + 1]
    int32_t* steps;        // [count + 1]

    double* derivative;    // [count] out: dL/dd of the positives
    double sum, by_param;  // by_param: the derivative by beta (loss.cpp adds that by the margin)
    int64_t nonzero, considered;
};

// Columns that are skipped at once where they are far above or below a positive.
inline constexpr int64_t kRankBlock = 128;

template <typename T>
struct RankBlock {
    T least, most;  // of its similarities
    T count;        // of its columns that are not NaN
};

// The soft ranks of positives near a centre among columns.
template <typename T>
struct RowRanks {
    const T* far;  // [m] far_factor of the columns
    int64_t m;
    const RankBlock<T>* blocks;  // of the columns; null: none is skipped
    const T *positives, *near;   // [count] their similarities and near_factor
    int64_t count;
    T inverse;  // of the temperature
};

template <typename T>
struct TripletKernels {
    // As TileKernels has it.
    void (*distances)(T* s, int64_t pitch, int rows, int cols, const T* x, int64_t x_stride,
                      const T* x_square, const T* y, int64_t y_stride, const T* y_square, int64_t dim);
    // Puts NaN where a negative's distance is out of range; returns how many negatives remain.
    int64_t (*keep_allowed)(T* s, int64_t m, const TripletParams<T>&);
    void (*all_negatives[3])(RowTriplets<T>&);  // by TripletTerm
    // The column of the largest similarity below `limit`, or of the smallest; the first among equals, or -1.
    int64_t (*largest)(const T* s, int64_t m, T limit);
    int64_t (*smallest)(const T* s, int64_t m);
    void (*rank_blocks)(const T* s, int64_t m, RankBlock<T>* blocks);
    void (*far_factors)(const T* s, int64_t m, T centre, T inverse, T* far);
    // Adds to [count] numbers, of each positive: the sum over the columns of the sigmoid g of their distance in
    // units of the temperature, and of its derivative g (1 - g).
    void (*add_ranks)(const RowRanks<T>&, double* ranks, double* slopes);
    // weights[k] += the sum over the positives of by_rank[j] g (1 - g).
    void (*add_rank_weights)(const RowRanks<T>&, const T* by_rank, T* weights);
    // below[b] += the columns' shares at or below edge b, for all bins + 1 edges.
    void (*add_shares)(const T* s, int64_t m, T bins, double* below);
    // weights[k] = by_place of the bin that column k lies in; 0 on an edge.
    void (*share_weights)(const T* s, int64_t m, T bins, const T* by_place, T* weights);
    // Turns weights over similarities into weights over products, in place of s, 0 where that is NaN; returns
    // the sum of (s - centre) times the former.
    double (*write_row_weights)(T* s, int64_t m, T* weights, T centre, bool euclidean);
    // The weights of a draw [m], relative to the largest, and their sum in each block of kDrawBlock.
    void (*draw_weights)(const T* s, int64_t m, const TripletParams<T>&, T* weights, double* sums);
    // b[j, i] = a[i, j].
    void (*transpose)(const T* a, T* b, int64_t pitch, int64_t rows, int64_t cols);
    // Both become a[i, j] + b[j, i]. a may be b where square.
    void (*add_transposed)(T* a, T* b, int64_t pitch, int64_t rows, int64_t cols);
    // bits: the non-zero columns of each line, 64 a word. Returns the number of non-zeros.
    int64_t (*find_nonzeros)(const T* w, int64_t pitch, int64_t rows, int64_t cols, uint64_t* bits);
    // out[i] += sum over those columns j of w[i, j] times point j. points: rows of `dim` numbers, `stride`
    // apart.
    void (*add_nonzeros)(const T* w, int64_t pitch, int64_t rows, int64_t cols, const uint64_t* bits,
                         const T* points, int64_t stride, int64_t dim, T* out, int64_t out_stride);
    // out += sum over k of weights[k] * points[index[k]].
    void (*add_points)(const T* weights, const int32_t* index, int64_t count, const T* points, int64_t stride,
                       int64_t dim, T* out);
};

// The table for the instruction set in use.
template <typename T>
const TripletKernels<T>& triplet_kernels();

}  // namespace dml::cpu
