// What a call of the loss is, without torch: the points, the formula and the options. The same description
// serves both engines.
#pragma once

#include <cstdint>

#include "losses/list.h"

namespace dml {

enum class Scalar { kFloat16, kBFloat16, kFloat32, kFloat64 };

// Mean over rows (over kept pairs where the formula counts those), over those whose loss is not 0, by
// rows that have a kept pair; the sum; or each row's own.
enum class Reduction { kMean, kMeanNonzero, kMeanValid, kSum, kNone };

// One side of the pairs. Rows may lie at any distance but are contiguous in themselves.
struct Points {
    const void* data = nullptr;  // [count, dim]
    int64_t stride = 0;          // from row to row, in elements
    const int64_t* labels = nullptr;
    int64_t count = 0;
};

// s_ij = <x_i, y_j>, or with `euclidean` -|x_i - y_j|; of unit rows where `normalize`.
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
    bool mine_self_pair = true;               // whether mining sees that pair; the loss does not
    const int64_t* num_valid_refs = nullptr;  // only so many of the first refs take part; null: all
    int64_t dim = 0;
    Scalar scalar = Scalar::kFloat32;
    FormulaId formula = {};
    double params[kMaxParams] = {};
    Similarity similarity;
    Mining mining;
    Reduction reduction = Reduction::kMean;
    bool return_sums = false;  // the result is [parts 0 and 1, counts 0 and 1], not yet divided
};

}  // namespace dml
