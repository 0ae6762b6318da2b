// The order of 16-byte chunks in rows of a tile in shared memory, and in the blocks of images (images.cuh).
//
// Tensor cores read eight rows of one chunk at once. In rows of 128 bytes chunk c of row r lies at place
// c ^ (r % 8), so these eight meet eight different columns of banks. In rows of 64 bytes two rows fill the banks
// once, and the place is c ^ (r / 2 % 4). The first is the 128-byte swizzle of wgmma, which as an address is
// bits 4-6 ^= bits 7-9 and repeats every 1024 bytes (PTX ISA, "Shared Memory Matrix Layout"): the same bytes are good
// wherever they begin on a multiple of 1024, and a bulk copy may move eight rows, or more, as they are.
#pragma once

#include "cuda/common/primitives.cuh"

namespace dml {

inline constexpr int kChunkBytes = 16;
inline constexpr int kSwizzleBytes = 128;                // a row of a block of an image
inline constexpr int kPatternBytes = 8 * kSwizzleBytes;  // eight rows, after which the swizzle repeats

// The byte at which a chunk of a row begins. (Unsigned, so that rows a whole pattern apart are a constant apart.)
template <int RowBytes = kSwizzleBytes>
DML_DEVICE int swizzled_chunk(unsigned row, unsigned chunk) {
    constexpr unsigned kRowsOfBanks = kSwizzleBytes / RowBytes, kChunks = RowBytes / kChunkBytes;
    return int(row * RowBytes + (chunk ^ (row / kRowsOfBanks % kChunks)) * kChunkBytes);
}

// The byte at which an element begins.
template <typename T, int RowBytes = kSwizzleBytes>
DML_DEVICE int swizzled_byte(unsigned row, unsigned column) {
    constexpr unsigned kElements = kChunkBytes / sizeof(T);
    return swizzled_chunk<RowBytes>(row, column / kElements) + int(column % kElements * sizeof(T));
}

}  // namespace dml
