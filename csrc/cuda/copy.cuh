// Boxes of a matrix travel from global to shared memory here, asynchronously and several ahead.
#pragma once

#include <cstdint>

#include "primitives.cuh"

namespace dml::cuda {

// A matrix in global memory. Its rows are contiguous; their distance is free.
template <typename T>
struct Matrix {
    const T* data;   // [rows, cols]
    int64_t stride;  // from row to row, in elements
    int64_t rows, cols;
    int align;  // bytes that the base and the stride are multiples of: 16, 8, 4 or less
};

// Every shared tile row ends in 16 bytes of padding. Rows of 128 bytes are then 144 bytes apart, an odd
// multiple of 16, so that the eight 16-byte rows of an ldmatrix, or eight lanes reading 16 bytes each
// down a column, hit different banks.
template <typename T>
inline constexpr int kPad = 16 / int(sizeof(T));

template <int Bytes, int Rows, int Cols, int Pitch, int Threads, typename T>
DML_DEVICE void copy_box_by(T* shared, const Matrix<T>& m, int64_t row0, int64_t col0) {
    constexpr int kElements = Bytes / int(sizeof(T));
    constexpr int kPerRow = Cols / kElements;
    constexpr int kUnroll =
        Bytes == 16 ? 4 : 1;  // narrow copies are for odd cases, and not worth the registers
#pragma unroll kUnroll
    for (int i = int(threadIdx.x); i < Rows * kPerRow; i += Threads) {
        const int r = i / kPerRow, c = i % kPerRow * kElements;
        const int64_t left = row0 + r < m.rows ? m.cols - col0 - c : 0;
        const int valid = left <= 0 ? 0 : left < kElements ? int(left) : kElements;
        const T* source = valid > 0 ? m.data + (row0 + r) * m.stride + col0 + c : m.data;
        if constexpr (Bytes >= 4) {
            cp_async<Bytes>(shared + r * Pitch + c, source, valid * int(sizeof(T)));
        } else {  // a 16-bit matrix of odd stride: too narrow for cp.async
            shared[r * Pitch + c] = valid > 0 ? *source : T(0.0f);
        }
    }
}

// Copies m[row0 : row0 + Rows, col0 : col0 + Cols] to shared [Rows, Pitch]; what lies outside m is 0.
// The widest copies that the alignment allows. col0 must be a multiple of 16 bytes.
template <int Rows, int Cols, int Pitch, int Threads, typename T>
DML_DEVICE void copy_box(T* shared, const Matrix<T>& m, int64_t row0, int64_t col0) {
    if (m.align >= 16) {
        copy_box_by<16, Rows, Cols, Pitch, Threads>(shared, m, row0, col0);
    } else if (m.align >= 8) {
        copy_box_by<8, Rows, Cols, Pitch, Threads>(shared, m, row0, col0);
    } else if constexpr (sizeof(T) <= 4) {
        if (sizeof(T) == 4 || m.align >= 4) {
            copy_box_by<4, Rows, Cols, Pitch, Threads>(shared, m, row0, col0);
        } else if constexpr (sizeof(T) == 2) {
            copy_box_by<2, Rows, Cols, Pitch, Threads>(shared, m, row0, col0);
        }
    }
}

// Runs use(stage) over `slices` slices in order while load(slice, stage) fetches Stages - 1 ahead.
// One barrier a slice does for both directions: it shows every thread what all have copied, and it
// follows everybody's use of the slice before, whose stage is the one that is filled next.
template <int Stages, typename Load, typename Use>
DML_DEVICE void pipeline(int64_t slices, const Load& load, const Use& use) {
    int stage = 0, ahead = 0;
    for (int64_t k = 1 - Stages; k < slices; ++k) {  // the first rounds only load
        if (k >= 0) {
            cp_async_wait<Stages - 2>();
            block_sync();
        }
        if (k + Stages - 1 < slices) load(k + Stages - 1, ahead);
        cp_async_commit();  // an empty group still counts, which keeps the wait uniform
        ahead = ahead + 1 == Stages ? 0 : ahead + 1;
        if (k < 0) continue;
        use(stage);
        stage = stage + 1 == Stages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    block_sync();  // the stages are free for whatever comes next
}

}  // namespace dml::cuda
