// One call of a pair loss, without torch: the points, the formula and the options, for both engines.
#pragma once

#include <cstdint>

#include "losses/list.h"

namespace dml {

enum class Scalar { kFloat16, kBFloat16, kFloat32, kFloat64 };

// The mean over rows (or kept pairs, as the formula's kCount says), over rows or pairs with a loss other than
// 0, or over rows with a kept pair; the sum; or the losses of the rows.
enum class Reduction { kMean, kMeanNonzero, kMeanValid, kSum, kNone };

// One side of the pairs.
struct Points {
    const void* data = nullptr;       // [count, dim], each row contiguous
    int64_t stride = 0;               // from row to row, in elements
    const int64_t* labels = nullptr;  // [count]
    int64_t count = 0;
};

// s_ij = <x_i, y_j>, or -|x_i - y_j| with `euclidean`; of rows scaled to unit length with `normalize`.
struct Similarity {
    bool euclidean = false, normalize = true;
};

struct Mining {
    bool on = false;
    double epsilon = 0.0;
};

struct Problem {
    Points queries, refs;  // refs are the queries where square
    bool square = true;
    const int64_t* self_index = nullptr;      // [N] the row of refs that is the same point as row i, or -1
    bool mine_self_pair = true;               // whether mining sees that pair; the loss never does
    const int64_t* num_valid_refs = nullptr;  // [1] how many of the first refs take part; null: all
    int64_t dim = 0;
    Scalar scalar = Scalar::kFloat32;
    FormulaId formula = {};
    double params[kMaxParams] = {};
    Similarity similarity;
    Mining mining;
    Reduction reduction = Reduction::kMean;
    bool both_directions = false;  // columns have losses too, over the rows
    bool return_sums = false;      // the result is [parts 0 and 1, counts 0 and 1], not yet divided
};

}  // namespace dml
