// Boxes of a matrix travel from global to shared memory here, asynchronously and several ahead.
//
// A product's loop has no issue slots to spare, so that everything about a copy is decided before it begins.
// Rows are whole 16-byte chunks (pack_rows sees to it). What a thread copies lies in one column of chunks.
// Rows past the last one are the last one again: whoever uses them multiplies them by 0 or looks away. Only
// along the rows must what lies past the end be 0, and the slice that is not whole comes first, before the
// loop.
#pragma once

#include <cstdint>

#include "cuda/common/primitives.cuh"

namespace dml::cuda {

// A matrix in global memory, of which each row begins and ends on a multiple of 16 bytes (with packed rows
// the columns between cols and that multiple are 0).
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

// The row itself, or the last one.
template <typename T>
DML_DEVICE int64_t clip_row(const Matrix<T>& m, int64_t i) {
    return i < m.rows ? i : m.rows > 0 ? m.rows - 1 : 0;
}

// The slices m[row0 : row0 + Rows, k : k + Depth], one after another: the last one first, since it may not be
// whole, then k = 0, Depth, ..
template <typename T, int Rows, int Depth, int Pitch, int Threads>
class RowSlices {
    using Own = Share<T, Rows, Depth, Threads>;
    const T* source_[Own::kChunks];

    template <typename Copy>
    DML_DEVICE void each(T* shared, const Copy& copy) {
        if (Own::idle()) return;
        T* to = shared + Own::row() * Pitch + Own::col();
#pragma unroll
        for (int c = 0; c < Own::kChunks; ++c) copy(to + c * Own::kApart * Pitch, source_[c]);
    }

   public:
    // Even if m has no rows, there must be memory of one.
    DML_DEVICE RowSlices(const Matrix<T>& m, int64_t row0) {
#pragma unroll
        for (int c = 0; c < Own::kChunks; ++c) {
            const int64_t i = clip_row(m, row0 + Own::row() + c * Own::kApart);
            source_[c] = m.data + i * m.stride + Own::col();
        }
    }
    static DML_DEVICE int count(const Matrix<T>& m) { return int((m.cols + Depth - 1) / Depth); }

    // Starts the first of them, to shared [Rows, Pitch].
    DML_DEVICE void start_first(T* shared, const Matrix<T>& m) {
        const int64_t k = (count(m) - 1) * int64_t(Depth);
        const bool inside = k + Own::col() < m.cols;
        each(shared,
             [&](T* to, const T* from) { cp_async<16>(to, inside ? from + k : from, inside ? 16 : 0); });
    }
    // Starts the next one.
    DML_DEVICE void start_next(T* shared) {
        each(shared, [](T* to, const T*& from) {
            cp_async<16>(to, from);
            from += Depth;
        });
    }
};

// The boxes m[row0 + row : row0 + row + Rows, col0 : col0 + Cols], for any row. What lies past the last
// column is anything.
template <typename T, int Rows, int Cols, int Pitch, int Threads>
class ColumnBoxes {
    using Own = Share<T, Rows, Cols, Threads>;
    const char* source_;     // of this thread at row0
    uint32_t stride_bytes_;  // less than 2^32: others are packed
    int last_;

   public:
    DML_DEVICE ColumnBoxes(const Matrix<T>& m, int64_t row0, int64_t col0)
        : stride_bytes_(uint32_t(m.stride * int64_t(sizeof(T)))) {
        const int64_t col = col0 + Own::col() < m.cols ? col0 + Own::col() : 0, last = m.rows - 1 - row0;
        source_ = reinterpret_cast<const char*>(m.data + row0 * m.stride + col);
        last_ = last < (1 << 30) ? int(last) : 1 << 30;
    }
    // Starts a copy to shared [Rows, Pitch]. m has at least one row from row0 on.
    DML_DEVICE void start(T* shared, int row) const {
        if (Own::idle()) return;
        T* to = shared + Own::row() * Pitch + Own::col();
#pragma unroll
        for (int c = 0; c < Own::kChunks; ++c) {
            const int i = row + Own::row() + c * Own::kApart;
            cp_async<16>(to + c * Own::kApart * Pitch,
                         source_ + uint64_t(uint32_t(i < last_ ? i : last_)) * stride_bytes_);
        }
    }
};

// Whole boxes [Rows, Cols] of rows that are SourcePitch apart, at 32-bit offsets from one place.
template <typename T, int Rows, int Cols, int SourcePitch, int Pitch, int Threads>
class WholeBoxes {
    using Own = Share<T, Rows, Cols, Threads>;
    const char* source_;

   public:
    explicit DML_DEVICE WholeBoxes(const T* source)
        : source_(reinterpret_cast<const char*>(source + Own::row() * SourcePitch + Own::col())) {}

    DML_DEVICE void start(T* shared, uint32_t offset) const {
        if (Own::idle()) return;
        T* to = shared + Own::row() * Pitch + Own::col();
        const T* from = reinterpret_cast<const T*>(source_ + offset * uint32_t(sizeof(T)));
#pragma unroll
        for (int c = 0; c < Own::kChunks; ++c) {
            cp_async<16>(to + c * Own::kApart * Pitch, from + c * Own::kApart * SourcePitch);
        }
    }
};

// Runs use(stage, fetch) over `slices` slices in order, while next(stage) fetches Stages - 1 ahead, the first
// one by first(stage): use calls fetch() once, as soon as it has what it needs to begin with.
// One barrier a slice does for both directions: it shows every thread what all have copied, and it
// follows everybody's use of the slice before, whose stage is the one that is filled next.
// WholeRounds: the slices are a multiple of Stages; which stage is which is then known at compile time.
template <int Stages, bool WholeRounds, typename First, typename Next, typename Use>
DML_DEVICE void pipeline(int slices, const First& first, const Next& next, const Use& use) {
    if (slices > 0) first(0);
    cp_async_commit();
#pragma unroll
    for (int k = 1; k < Stages - 1; ++k) {
        if (k < slices) next(k);
        cp_async_commit();  // an empty group still counts, which keeps the wait uniform
    }
    const auto step = [&](bool more, int stage, int free) {
        cp_async_wait<Stages - 2>();
        block_sync();
        use(stage, [&] {
            if (more) next(free);
            cp_async_commit();
        });
    };
    int stage = 0, free = Stages - 1;
#pragma unroll 1
    for (int k = 0; k < slices; k += WholeRounds ? Stages : 1) {
        if constexpr (WholeRounds) {
            const bool last_round = k + Stages >= slices;
#pragma unroll
            for (int s = 0; s < Stages; ++s) step(s == 0 || !last_round, s, (s + Stages - 1) % Stages);
        } else {
            step(k + Stages - 1 < slices, stage, free);
            free = stage;
            stage = stage + 1 == Stages ? 0 : stage + 1;
        }
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
