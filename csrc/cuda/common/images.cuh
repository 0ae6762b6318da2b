// Images: matrices as tile products read them, written once.
//
// An image is made of blocks of a tile's rows x 128 bytes, swizzled (swizzle.cuh), row by row of blocks, with 0 past the
// matrix's edges. Odd dimensions, strides and addresses end here: whatever reads an image reads whole blocks, in
// 16-byte chunks. Where an element has two parts, x = big + small / 2048, each block is there twice, big parts
// then small ones.
#pragma once

#include <type_traits>

#include "core/portable.h"
#include "cuda/common/swizzle.cuh"

namespace dml::cuda {

struct Image {
    const unsigned char* blocks = nullptr;  // [tiles][blocks across][parts][rows of a tile][128 bytes]
    const float* scales =
        nullptr;     // [rows] powers of two, by which the image's rows are the matrix's; null: 1
    int across = 0;  // blocks side by side
};

template <typename Part, int Rows, int Parts>
struct ImageLayout {
    using Element = Part;
    static constexpr int kRows = Rows, kParts = Parts;
    static constexpr int kColumns = kSwizzleBytes / int(sizeof(Part));  // of a block
    static constexpr int kPartBytes = Rows * kSwizzleBytes, kBlockBytes = Parts * kPartBytes;

    static constexpr int64_t across(int64_t cols) { return (cols + kColumns - 1) / kColumns; }
    // Of the rows of one tile.
    static constexpr int64_t tile_bytes(int64_t cols) { return across(cols) * kBlockBytes; }

    static DML_DEVICE const unsigned char* block(const Image& image, int64_t tile, int64_t across) {
        return image.blocks + (tile * image.across + across) * kBlockBytes;
    }
    // The image from this tile on.
    static DML_INLINE Image from(const Image& image, int64_t tile) {
        return {image.blocks + tile * image.across * kBlockBytes,
                image.scales ? image.scales + tile * kRows : nullptr, image.across};
    }
};

// How threads share chunks: calls f(chunk) for those of this thread, which lie Threads apart.
template <int Chunks, int Threads>
struct ChunksOfThread {
    static constexpr int kCount = (Chunks + Threads - 1) / Threads;
    static_assert(Chunks % Threads == 0 || Chunks < Threads, "even shares, or one chunk for some threads");
    template <typename F>
    static DML_DEVICE void for_each(const F& f) {
        if (Chunks < Threads && int(threadIdx.x) >= Chunks) return;
#pragma unroll
        for (int c = 0; c < kCount; ++c) f(threadIdx.x + unsigned(c * Threads));
    }
};

// Writes a chunk of an image's row, and of its small parts, from as many elements on 16 bytes.
template <typename Layout, typename T>
DML_DEVICE void write_chunk(const T* x, unsigned char* chunk) {
    using Element = typename Layout::Element;
    if constexpr (std::is_same_v<T, Element>) {
        *reinterpret_cast<uint4*>(chunk) = *reinterpret_cast<const uint4*>(x);
    } else {
        alignas(16) uint32_t big[4], small[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (Layout::kParts == 2) {
                split_half2(x[2 * i], x[2 * i + 1], big[i], small[i]);
            } else {
                big[i] = pack2<Element>(x[2 * i], x[2 * i + 1]);
            }
        }
        *reinterpret_cast<uint4*>(chunk) = reinterpret_cast<const uint4&>(big);
        if constexpr (Layout::kParts == 2)
            *reinterpret_cast<uint4*>(chunk + Layout::kPartBytes) = reinterpret_cast<const uint4&>(small);
    }
}

// ---- slices along k: rows of the image are rows of the product ------------------------------------------------

inline constexpr int kSliceBytes = 64;  // of a row: half a block's

// Slices of a tile's rows, to shared [parts][kRows][kSliceBytes].
template <typename Layout, int Threads>
class RowsOfImage {
    static constexpr int kChunks = kSliceBytes / kChunkBytes, kSlices = kSwizzleBytes / kSliceBytes;
    using Share = ChunksOfThread<Layout::kParts * Layout::kRows * kChunks, Threads>;
    const unsigned char* tile_;

   public:
    static constexpr int kBytes = Layout::kParts * Layout::kRows * kSliceBytes;

    DML_DEVICE RowsOfImage(const Image& image, int64_t tile) : tile_(Layout::block(image, tile, 0)) {}

    DML_DEVICE void start(unsigned char* shared, unsigned slice) const {
        const unsigned char* block = tile_ + uint64_t(slice / kSlices) * unsigned(Layout::kBlockBytes);
        const unsigned first = slice % kSlices * kChunks;
        // A part's rows are whole patterns of the swizzle, so the parts' rows count on.
        Share::for_each([&](unsigned c) {
            const unsigned chunk = c % kChunks, row = c / kChunks;
            cp_async<kChunkBytes>(shared + swizzled_chunk<kSliceBytes>(row, chunk),
                                  block + swizzled_chunk(row, first + chunk));
        });
    }
};

// Such a slice, as elements (row, k).
template <typename Layout>
struct AlongImage {
    using Value = typename Layout::Element;
    static constexpr bool kAlongK = true;
    const unsigned char* data;
    DML_DEVICE const Value* at(int i, int k) const {
        return reinterpret_cast<const Value*>(data + swizzled_byte<Value, kSliceBytes>(i, k));
    }
    DML_DEVICE AlongImage part(int p) const { return {data + p * Layout::kRows * kSliceBytes}; }
};

// ---- slices across k: rows of the image are k ----------------------------------------------------------------

// Boxes of Depth rows and Columns columns, whole blocks, to shared [parts][blocks][Depth][128 bytes].
template <typename Layout, int Depth, int Columns, int Threads>
class BoxesOfImage {
    static constexpr int kBlocks = Columns / Layout::kColumns, kChunks = Depth * kSwizzleBytes / kChunkBytes;
    static_assert(Columns % Layout::kColumns == 0 && Depth % 8 == 0, "whole blocks and patterns");
    using Share = ChunksOfThread<Layout::kParts * kBlocks * kChunks, Threads>;
    const unsigned char* blocks_;
    unsigned across_, last_;

   public:
    static constexpr int kBytes = Layout::kParts * kBlocks * kChunks * kChunkBytes;

    // Of columns col0 .. of the image, whose rows are those of its tiles. Past the last block it is copied again: what
    // comes of it lies past the edge.
    DML_DEVICE BoxesOfImage(const Image& image, int64_t col0)
        : blocks_(Layout::block(image, 0, col0 / Layout::kColumns)),
          across_(unsigned(image.across)),
          last_(across_ - 1u - unsigned(col0 / Layout::kColumns)) {}

    // Rows `row` .. of a tile. (Nothing is kept from one to the next: products need the registers.)
    DML_DEVICE void start(unsigned char* shared, unsigned tile, unsigned row) const {
        const unsigned char* from = blocks_ + uint64_t(tile * across_) * unsigned(Layout::kBlockBytes) +
                                    row * unsigned(kSwizzleBytes);
        Share::for_each([&](unsigned c) {
            const unsigned box = c / kChunks, block = box % kBlocks;
            cp_async<kChunkBytes>(shared + c * kChunkBytes,
                                  from + (block < last_ ? block : last_) * Layout::kBlockBytes +
                                      box / kBlocks * Layout::kPartBytes + c % kChunks * kChunkBytes);
        });
    }
};

// Such a box, as elements (column, k).
template <typename Layout, int Depth, int Columns>
struct AcrossImage {
    using Value = typename Layout::Element;
    static constexpr bool kAlongK = false;
    static constexpr int kBlocks = Columns / Layout::kColumns;
    const unsigned char* data;
    DML_DEVICE const Value* at(int i, int k) const {
        return reinterpret_cast<const Value*>(data + i / Layout::kColumns * (Depth * kSwizzleBytes) +
                                              swizzled_byte<Value>(k, i % Layout::kColumns));
    }
    DML_DEVICE AcrossImage part(int p) const { return {data + p * kBlocks * Depth * kSwizzleBytes}; }
};

}  // namespace dml::cuda
