// Where wgmma looks for an element of a block of an image: rows of 128 bytes, swizzled.
//
// An image is a matrix of 16-bit elements as blocks of 128 rows x 64 columns. A row of a block is 128 bytes:
// eight chunks of 16 bytes, one of each 16-byte column of shared memory's 32 banks. In the 128-byte swizzle
// chunk c of row r lies at place c ^ (r % 8) of its row, so eight rows of one chunk, which the tensor cores read
// together, meet eight different columns of banks. As an address: bits 4-6 ^= bits 7-9, which repeats every
// 1024 bytes (PTX ISA, "Shared Memory Matrix Layout"). So the same bytes are good wherever they begin on a
// multiple of 1024, and a bulk copy may move a block, or any eight rows of it, as it is.
#pragma once

#include "cuda/common/primitives.cuh"

namespace dml {

inline constexpr int kBlockRows = 128, kBlockColumns = 64;
inline constexpr int kSwizzleBytes = 128;                // a row of a block
inline constexpr int kPatternBytes = 8 * kSwizzleBytes;  // eight rows, after which the swizzle repeats
inline constexpr int kBlockBytes = kBlockRows * kSwizzleBytes;

// The byte of a block at which this element begins.
DML_DEVICE int swizzled_byte(int row, int column) {
    constexpr int kChunk = 8;  // elements
    return row * kSwizzleBytes + ((column / kChunk) ^ (row % 8)) * 16 + column % kChunk * 2;
}

}  // namespace dml
