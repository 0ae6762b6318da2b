// Images: matrices as bulk copies and wgmma want them, written once.
//
// An image is made of blocks of 128 x 64 (swizzle.cuh), row by row of blocks, with 0 past the matrix's edges. Where an
// element has two parts each block is there twice, big parts then small ones. Odd dimensions, strides and addresses end
// here: whatever reads an image reads whole blocks.
#pragma once

#include "cuda/common/swizzle.cuh"
#include "cuda/pairs/rows.cuh"

namespace dml::cuda {

template <typename T>
struct Image {
    const T* data;
    int blocks_across, parts;

    DML_DEVICE const char* block(int64_t down, int64_t across) const {
        return reinterpret_cast<const char*>(data) + (down * blocks_across + across) * parts * kBlockBytes;
    }
};

constexpr int64_t blocks_down(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
constexpr int64_t blocks_across(int64_t cols) { return (cols + kBlockColumns - 1) / kBlockColumns; }
constexpr int64_t image_bytes(int64_t rows, int64_t cols, int parts) {
    return blocks_down(rows) * blocks_across(cols) * parts * kBlockBytes;
}

inline constexpr int kPrepareThreads = 256;
inline constexpr int kPrepareRows = kPrepareThreads / kWarpSize;  // of a thread block: a warp a row

// The image, of one part, and the norms of a matrix of 16-bit elements whose rows may begin anywhere. A launch of
// blocks_down(rows) * kBlockRows / kPrepareRows thread blocks.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare(Matrix<T> points, Similarity kind, float* norms, T* image) {
    constexpr int kChunk = 16 / int(sizeof(T));
    static_assert(sizeof(T) == 2, "16-bit elements");
    const int64_t i = int64_t(blockIdx.x) * kPrepareRows + warp_id();
    const int64_t chunks = blocks_across(points.cols) * (kBlockColumns / kChunk);
    const T* const row = points.data + i * points.stride;
    const int64_t last = i < points.rows ? points.cols : 0;  // past the last row there is nothing to read
    const bool is_aligned = reinterpret_cast<uintptr_t>(points.data) % 16 == 0 && points.stride % kChunk == 0;
    char* const first_block =
        reinterpret_cast<char*>(image) + i / kBlockRows * blocks_across(points.cols) * kBlockBytes;
    float squares = 0.0f;
#pragma unroll 1
    for (int64_t chunk = lane_id(); chunk < chunks; chunk += kWarpSize) {
        const int64_t d = chunk * kChunk;
        alignas(16) T x[kChunk];
        if (is_aligned && d + kChunk <= last) {
            reinterpret_cast<uint4&>(x) = *reinterpret_cast<const uint4*>(row + d);
        } else {
#pragma unroll
            for (int e = 0; e < kChunk; ++e) x[e] = d + e < last ? row[d + e] : T(0.0f);
        }
#pragma unroll
        for (int e = 0; e < kChunk; ++e) squares += float(x[e]) * float(x[e]);
        char* const block = first_block + d / kBlockColumns * kBlockBytes;
        *reinterpret_cast<uint4*>(block + swizzled_byte(int(i % kBlockRows), int(d % kBlockColumns))) =
            reinterpret_cast<const uint4&>(x);
    }
    squares = warp_sum(squares);
    if (i < points.rows && lane_id() == 0) norms[i] = row_norm(squares, points, i, kind);
}

}  // namespace dml::cuda
