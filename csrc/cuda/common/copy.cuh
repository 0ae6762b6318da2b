// Asynchronous copies of boxes of a matrix to shared memory, several ahead of their use.
//
// A product's loop should issue little else, so everything about a copy is decided before the loop. Rows are
// whole 16-byte chunks (pack_rows), and a thread copies one column of chunks. Past the last row the last row
// is copied again; its products are multiplied by 0 or ignored. Only along k must memory past the end read as
// 0, and the slice that may not be whole comes first, before the loop.
#pragma once

#include <cstdint>

#include "cuda/common/primitives.cuh"

namespace dml::cuda {

// A matrix in global memory. The copies here take one whose rows begin and end on multiples of 16 bytes; in packed rows
// the columns between cols and that multiple are 0.
template <typename T>
struct Matrix {
    const T* data;   // [rows, cols]
    int64_t stride;  // from row to row, in elements
    int64_t rows, cols;
};

// Whether rows begin on multiples of 16 bytes.
template <typename T>
DML_DEVICE bool begin_on_chunks(const Matrix<T>& m) {
    return (reinterpret_cast<uintptr_t>(m.data) | uint64_t(m.stride) * sizeof(T)) % 16 == 0;
}

// Elements of padding after every row of a shared tile: 16 bytes. Rows of 128 bytes are then an odd multiple
// of 16 bytes apart, so the eight 16-byte rows of an ldmatrix, or eight lanes reading 16 bytes down a column,
// hit different banks.
template <typename T>
inline constexpr int kPad = 16 / int(sizeof(T));

// How the threads of a block share the 16-byte chunks of a box [Rows, Cols]: a thread has kCount of one
// column of chunks, kRowStep rows apart.
template <typename T, int Rows, int Cols, int Threads>
struct ChunkShare {
    static constexpr int kElements = 16 / int(sizeof(T));
    static constexpr int kAcross = Cols / kElements;
    static constexpr int kRowStep = Threads / kAcross;
    static constexpr int kCount = (Rows + kRowStep - 1) / kRowStep;
    static_assert(Cols % kElements == 0 && Threads % kAcross == 0, "whole columns of chunks");
    static_assert(Rows % kRowStep == 0 || Rows < kRowStep, "even shares, or one chunk for some threads");

    static DML_DEVICE int row() { return int(threadIdx.x) / kAcross; }
    static DML_DEVICE int col() { return int(threadIdx.x) % kAcross * kElements; }
    static DML_DEVICE bool idle() { return Rows < kRowStep && row() >= Rows; }
};

// The row, or the last one past that.
template <typename T>
DML_DEVICE int64_t clip_row(const Matrix<T>& m, int64_t i) {
    return i < m.rows ? i : m.rows > 0 ? m.rows - 1 : 0;
}

// The slices m[row0 : row0 + Rows, k : k + Depth] one after another: the last first, since it may not be
// whole, then k = 0, Depth, ..
template <typename T, int Rows, int Depth, int Pitch, int Threads>
class RowSlices {
    using Chunks = ChunkShare<T, Rows, Depth, Threads>;
    const T* source_[Chunks::kCount];

    template <typename Copy>
    DML_DEVICE void for_each(T* shared, const Copy& copy) {
        if (Chunks::idle()) return;
        T* to = shared + Chunks::row() * Pitch + Chunks::col();
#pragma unroll
        for (int c = 0; c < Chunks::kCount; ++c) copy(to + c * Chunks::kRowStep * Pitch, source_[c]);
    }

   public:
    // m.data must point to one row at least, even if m has none.
    DML_DEVICE RowSlices(const Matrix<T>& m, int64_t row0) {
#pragma unroll
        for (int c = 0; c < Chunks::kCount; ++c) {
            const int64_t i = clip_row(m, row0 + Chunks::row() + c * Chunks::kRowStep);
            source_[c] = m.data + i * m.stride + Chunks::col();
        }
    }
    static DML_DEVICE int count(const Matrix<T>& m) { return int((m.cols + Depth - 1) / Depth); }

    // Starts the first slice, to shared [Rows, Pitch].
    DML_DEVICE void start_first(T* shared, const Matrix<T>& m) {
        const int64_t k = (count(m) - 1) * int64_t(Depth);
        const bool inside = k + Chunks::col() < m.cols;
        for_each(shared,
                 [&](T* to, const T* from) { cp_async<16>(to, inside ? from + k : from, inside ? 16 : 0); });
    }
    // Starts the slice from column k on, of a matrix whose rows are whole 16-byte chunks; past the last column
    // undefined.
    DML_DEVICE void start_at(T* shared, const Matrix<T>& m, int64_t k) {
        const int64_t col = k + Chunks::col() < m.cols ? k : -int64_t(Chunks::col());
        for_each(shared, [&](T* to, const T* from) { cp_async<16>(to, from + col); });
    }
    // Starts the next one.
    DML_DEVICE void start_next(T* shared) {
        for_each(shared, [](T* to, const T*& from) {
            cp_async<16>(to, from);
            from += Depth;
        });
    }
};

// The boxes m[row0 + row : row0 + row + Rows, col0 : col0 + Cols], for any row; past the last column
// undefined.
template <typename T, int Rows, int Cols, int Pitch, int Threads>
class ColumnBoxes {
    using Chunks = ChunkShare<T, Rows, Cols, Threads>;
    const char* source_;     // of this thread, at row0
    uint32_t stride_bytes_;  // wider rows are packed
    int last_;

   public:
    DML_DEVICE ColumnBoxes(const Matrix<T>& m, int64_t row0, int64_t col0)
        : stride_bytes_(uint32_t(m.stride * int64_t(sizeof(T)))) {
        const int64_t col = col0 + Chunks::col() < m.cols ? col0 + Chunks::col() : 0,
                      last = m.rows - 1 - row0;
        source_ = reinterpret_cast<const char*>(m.data + row0 * m.stride + col);
        last_ = last < (1 << 30) ? int(last) : 1 << 30;
    }
    // Starts a copy to shared [Rows, Pitch]. m has at least one row from row0 on.
    DML_DEVICE void start(T* shared, int row) const {
        if (Chunks::idle()) return;
        T* to = shared + Chunks::row() * Pitch + Chunks::col();
#pragma unroll
        for (int c = 0; c < Chunks::kCount; ++c) {
            const int i = row + Chunks::row() + c * Chunks::kRowStep;
            cp_async<16>(to + c * Chunks::kRowStep * Pitch,
                         source_ + uint64_t(uint32_t(i < last_ ? i : last_)) * stride_bytes_);
        }
    }
};

// Whole boxes [Rows, Cols] of rows SourcePitch apart, at 32-bit offsets from one address.
template <typename T, int Rows, int Cols, int SourcePitch, int Pitch, int Threads>
class WholeBoxes {
    using Chunks = ChunkShare<T, Rows, Cols, Threads>;
    const char* source_;

   public:
    explicit DML_DEVICE WholeBoxes(const T* source)
        : source_(reinterpret_cast<const char*>(source + Chunks::row() * SourcePitch + Chunks::col())) {}

    DML_DEVICE void start(T* shared, uint32_t offset) const {
        if (Chunks::idle()) return;
        T* to = shared + Chunks::row() * Pitch + Chunks::col();
        const T* from = reinterpret_cast<const T*>(source_ + offset * uint32_t(sizeof(T)));
#pragma unroll
        for (int c = 0; c < Chunks::kCount; ++c) {
            cp_async<16>(to + c * Chunks::kRowStep * Pitch, from + c * Chunks::kRowStep * SourcePitch);
        }
    }
};

// Runs use(stage, fetch) over `slices` slices in order, while copies run Stages - 1 ahead: first(stage)
// starts the first, next(stage) each of the others. use calls fetch() once, when its first loads are issued.
// One barrier a slice serves both directions: it publishes the copies of all threads, and it follows every
// thread's use of the slice before, whose stage is filled next.
template <int Stages, typename First, typename Next, typename Use>
DML_DEVICE void pipeline(int slices, const First& first, const Next& next, const Use& use) {
    if (slices > 0) first(0);
    cp_async_commit();
#pragma unroll
    for (int k = 1; k < Stages - 1; ++k) {
        if (k < slices) next(k);
        cp_async_commit();  // an empty group still counts, which keeps the wait uniform
    }
    int stage = 0, free = Stages - 1;
#pragma unroll 1
    for (int k = 0; k < slices; ++k) {
        cp_async_wait<Stages - 2>();
        block_sync();
        use(stage, [&] {
            if (k + Stages - 1 < slices) next(free);
            cp_async_commit();
        });
        free = stage;
        stage = stage + 1 == Stages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    block_sync();  // the stages may be reused
}

// ---- rows that are not aligned ------------------------------------------------------------------------

inline constexpr int kPackThreads = 256;

// Row stride of a packed copy, in elements.
template <typename T>
int64_t packed_stride(int64_t cols) {
    constexpr int64_t kElements = 16 / sizeof(T);
    return (cols + kElements - 1) / kElements * kElements;
}

// One warp a row, from any address and stride to packed [rows, pitch].
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_rows(const T* data, int64_t stride, int64_t rows, int64_t cols, int64_t pitch, T* packed) {
    wait_for_previous_kernel();
    const int64_t i = int64_t(blockIdx.x) * (kPackThreads / kWarpSize) + warp_id();
    if (i >= rows) return;
#pragma unroll 4
    for (int64_t d = lane_id(); d < pitch; d += kWarpSize) {
        packed[i * pitch + d] = d < cols ? data[i * stride + d] : T(0.0f);
    }
}

}  // namespace dml::cuda
