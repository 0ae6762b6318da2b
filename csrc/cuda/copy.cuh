// Boxes of a matrix travel from global to shared memory here, asynchronously and several ahead.
//
// A product's loop has no issue slots to spare, so that everything about a copy is decided before it begins:
// rows are 16-byte aligned (pack_rows sees to it), what a thread copies lies in one column of 16-byte chunks,
// rows past the last one are the last one again (whoever uses them multiplies them by 0 or looks away), and
// what lies past the last column is zero-filled in the last slice only.
#pragma once

#include <cstdint>

#include "primitives.cuh"

namespace dml::cuda {

// A matrix in global memory. Base and stride are multiples of 16 bytes.
template <typename T>
struct Matrix {
    const T* data;   // [rows, cols]
    int64_t stride;  // from row to row, in elements
    int64_t rows, cols;
};

// Every shared tile row ends in 16 bytes of padding. Rows of 128 bytes are then 144 bytes apart, an odd
// multiple of 16, so that the eight 16-byte rows of an ldmatrix, or eight lanes reading 16 bytes each
// down a column, hit different banks.
template <typename T>
inline constexpr int kPad = 16 / int(sizeof(T));

// How the threads of a block share the 16-byte chunks of a box [Rows, Cols]: thread t has those in one
// column of chunks, kApart rows from each other.
template <typename T, int Rows, int Cols, int Threads>
struct Share {
    static constexpr int kElements = 16 / int(sizeof(T));
    static constexpr int kAcross = Cols / kElements;
    static constexpr int kApart = Threads / kAcross;
    static constexpr int kChunks = (Rows + kApart - 1) / kApart;
    static_assert(Cols % kElements == 0 && Threads % kAcross == 0, "whole columns of chunks");
    static_assert(Rows % kApart == 0 || Rows < kApart, "even shares, or one chunk for some threads");

    static DML_DEVICE int row() { return int(threadIdx.x) / kAcross; }
    static DML_DEVICE int col() { return int(threadIdx.x) % kAcross * kElements; }
    static DML_DEVICE bool idle() { return Rows < kApart && row() >= Rows; }
};

DML_DEVICE int clip_to_chunk(int64_t bytes) { return bytes < 0 ? 0 : bytes < 16 ? int(bytes) : 16; }

// The slices m[row0 : row0 + Rows, k : k + Depth] for k = 0, Depth, .., one after another.
template <typename T, int Rows, int Depth, int Pitch, int Threads>
class RowSlices {
    using Own = Share<T, Rows, Depth, Threads>;
    const T* source_[Own::kChunks];
    int whole_, tail_;  // bytes of a chunk in a slice, and in the last one

   public:
    DML_DEVICE RowSlices(const Matrix<T>& m, int64_t row0) : whole_(m.rows > 0 ? 16 : 0) {
        const int64_t last = m.rows - 1;
#pragma unroll
        for (int c = 0; c < Own::kChunks; ++c) {
            const int64_t i = row0 + Own::row() + c * Own::kApart;
            source_[c] = m.data + (i < last ? i : last) * m.stride + Own::col();
        }
        const int64_t left = m.cols - (count(m) - 1) * int64_t(Depth) - Own::col();
        tail_ = m.rows > 0 ? clip_to_chunk(left * int64_t(sizeof(T))) : 0;
    }
    static DML_DEVICE int count(const Matrix<T>& m) { return int((m.cols + Depth - 1) / Depth); }

    // Starts the next one, to shared [Rows, Pitch].
    DML_DEVICE void start(T* shared, bool is_last) {
        if (Own::idle()) return;
        const int valid = is_last ? tail_ : whole_;
        T* to = shared + Own::row() * Pitch + Own::col();
#pragma unroll
        for (int c = 0; c < Own::kChunks; ++c) {
            cp_async<16>(to + c * Own::kApart * Pitch, source_[c], valid);
            source_[c] += Depth;
        }
    }
};

// The boxes m[row : row + Rows, col0 : col0 + Cols], for any rows.
template <typename T, int Rows, int Cols, int Pitch, int Threads>
class ColumnBoxes {
    using Own = Share<T, Rows, Cols, Threads>;
    const T* source_;  // of this thread in row 0
    int64_t stride_, last_;
    int valid_;

   public:
    DML_DEVICE ColumnBoxes(const Matrix<T>& m, int64_t col0)
        : source_(m.data + col0 + Own::col()),
          stride_(m.stride),
          last_(m.rows - 1),
          valid_(clip_to_chunk((m.cols - col0 - Own::col()) * int64_t(sizeof(T)))) {}

    // Copies one to shared [Rows, Pitch]. There must be a row.
    DML_DEVICE void start(T* shared, int64_t row) const {
        if (Own::idle()) return;
        T* to = shared + Own::row() * Pitch + Own::col();
#pragma unroll
        for (int c = 0; c < Own::kChunks; ++c) {
            const int64_t i = row + Own::row() + c * Own::kApart;
            cp_async<16>(to + c * Own::kApart * Pitch, source_ + (i < last_ ? i : last_) * stride_, valid_);
        }
    }
};

// Copies a whole box [Rows, Cols] between pitches known at compile time.
template <int Rows, int Cols, int SourcePitch, int Pitch, int Threads, typename T>
DML_DEVICE void copy_box(T* shared, const T* source) {
    using Own = Share<T, Rows, Cols, Threads>;
    if (Own::idle()) return;
    T* to = shared + Own::row() * Pitch + Own::col();
    const T* from = source + Own::row() * SourcePitch + Own::col();
#pragma unroll
    for (int c = 0; c < Own::kChunks; ++c) {
        cp_async<16>(to + c * Own::kApart * Pitch, from + c * Own::kApart * SourcePitch);
    }
}

// Runs use(stage, fetch) over `slices` slices in order, while load(slice, stage) fetches Stages - 1 ahead:
// use calls fetch() once, as soon as it has what it needs to begin with.
// One barrier a slice does for both directions: it shows every thread what all have copied, and it
// follows everybody's use of the slice before, whose stage is the one that is filled next.
template <int Stages, typename Load, typename Use>
DML_DEVICE void pipeline(int slices, const Load& load, const Use& use) {
#pragma unroll
    for (int k = 0; k < Stages - 1; ++k) {
        if (k < slices) load(k, k);
        cp_async_commit();  // an empty group still counts, which keeps the wait uniform
    }
    int stage = 0, free = Stages - 1;
#pragma unroll 1
    for (int k = 0; k < slices; ++k) {
        cp_async_wait<Stages - 2>();
        block_sync();
        use(stage, [&] {
            if (k + Stages - 1 < slices) load(k + Stages - 1, free);
            cp_async_commit();
        });
        free = stage;
        stage = stage + 1 == Stages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    block_sync();  // the stages are free for whatever comes next
}

// ---- rows that are not aligned ------------------------------------------------------------------------

inline constexpr int kPackThreads = 256;

// Elements from row to row of a packed copy.
template <typename T>
int64_t packed_stride(int64_t cols) {
    constexpr int64_t kElements = 16 / sizeof(T);
    return (cols + kElements - 1) / kElements * kElements;
}

// One warp a row: from any address and stride to packed [rows, packed_stride].
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_rows(const T* data, int64_t stride, int64_t rows, int64_t cols, int64_t pitch, T* packed) {
    const int64_t i = int64_t(blockIdx.x) * (kPackThreads / kWarpSize) + warp_id();
    if (i >= rows) return;
#pragma unroll 4
    for (int64_t d = lane_id(); d < pitch; d += kWarpSize) {
        packed[i * pitch + d] = d < cols ? data[i * stride + d] : T(0.0f);
    }
}

}  // namespace dml::cuda
