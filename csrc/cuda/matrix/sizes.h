// When the matrix path serves, what it leaves for backward, and where. Without CUDA code, as a build without
// CUDA has to know it for torch.compile. Sizes are of type Int (core/sizes.h).
#pragma once

#include <cstdint>

#include "core/sizes.h"

namespace dml::cuda {

inline constexpr int kHeader = 4;                    // numbers of all rows
inline constexpr int64_t kMatrixBytes = 32ll << 20;  // of similarities, up to which the matrix path serves
inline constexpr int kChunk = 64;                    // columns of a row that are empty together
inline constexpr int kChunksOfSpan = 8;              // a byte tells which of them are
inline constexpr int kSpan = kChunk * kChunksOfSpan;

// Numbers from row to row of the matrix: rows are whole 16-byte chunks. acc_bytes, here and below: of a
// number of the type that sums are computed in.
template <typename Int>
Int matrix_pitch(const Int& m, int64_t acc_bytes) {
    return round_up(m, 16 / acc_bytes);
}

// 1 or 0. A batch without rows or columns is a matrix, too.
template <typename Int>
Int uses_matrix(const Int& n, const Int& m, int64_t acc_bytes, int64_t most_bytes = kMatrixBytes) {
    return is_positive(Int(most_bytes + 1) - n * matrix_pitch(m, acc_bytes) * Int(acc_bytes));
}

// [header | norms of the rows | of the references | matrix | occupied chunks], as offsets in bytes.
template <typename Int>
struct MatrixSizes {
    Int pitch, spans;  // of a row
    Int matrix, occupied, bytes;

    MatrixSizes(const Int& n, const Int& m, bool square, int64_t acc_bytes)
        : pitch(matrix_pitch(m, acc_bytes)),
          spans(ceil_div(m, kSpan)),
          matrix(round_up((Int(kHeader) + n + (square ? Int(0) : m)) * Int(acc_bytes), 16)),
          occupied(matrix + n * pitch * Int(acc_bytes)),
          bytes(round_up(occupied + n * spans, 16)) {}
};

}  // namespace dml::cuda
