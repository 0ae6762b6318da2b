// A tile of 128 x 128 of a product of two images, on the tensor cores of a multiprocessor of sm_90a.
//
// A producer warp copies slices of 64 along k into a ring of stages, and two consumer warpgroups multiply them, 64 rows
// of the tile each. A stage's `full` mbarrier tells consumers that its bytes have landed, `empty` tells the producer
// that all consumer warps are done with them. Phases of both are counted by rounds of the ring.
//
// Operands come K-major (an image's rows are rows of the tile, or columns) or MN-major (its rows are k), so that the
// image of points is the operand of their similarities, and of weights times points.
//
// With two parts, x = big + 2^-11 small, a slice's product is big big + 2^-11 (big small + small big), summed from 0
// and joined to the others by a rounded addition: tensor cores truncate their sums, of which this keeps them short.
#pragma once

#include "cuda/common/images.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/wgmma.cuh"

namespace dml::cuda {

inline constexpr int kProductTile = 128, kSliceDepth = 64, kStages = 3;
inline constexpr int kConsumerWarps = 8, kConsumers = kConsumerWarps * kWarpSize;
inline constexpr int kWgmmaThreads = kConsumers + kWarpSize;

template <typename T, Major kA, Major kB, int kParts>
class TileProduct {
    static_assert(kParts == 1 || kParts == 2, "whole, or big and small parts");
    using Layout = ImageLayout<T, kProductTile, kParts>;
    static constexpr int kPartBytes = Layout::kPartBytes;
    static constexpr int kOperandBytes = Layout::kBlockBytes;  // 128 x 64, or 64 x 128
    static constexpr int kStageBytes = 2 * kOperandBytes;      // A, then B
    static constexpr int kHalfBytes = kPartBytes / 2;          // 64 rows of a block
    static constexpr int kSteps = kSliceDepth / kWgmmaK;

    char* stages_;
    Mbarrier* full_;
    Mbarrier* empty_;

    template <typename U>
    static DML_DEVICE U* array(int byte_offset, int count) {
        return pattern_aligned_array<U>(byte_offset, count);
    }

    // A place in the ring of stages, and the parity of the phases of its round.
    struct Turn {
        int stage = 0, parity = 0;
        DML_DEVICE void advance() {
            stage = stage + 1 == kStages ? 0 : stage + 1;
            parity ^= stage == 0;
        }
        DML_DEVICE int stage_before() const { return stage == 0 ? kStages - 1 : stage - 1; }
    };

    // A slice of an operand: of a K-major one 128 rows of a block; of an MN-major one half the rows of two blocks
    // side by side. If there is no second block its place is left as it is: what comes of it lies past the edge.
    template <Major kMajor>
    static DML_DEVICE int operand_bytes(const Image& image, int tile) {
        if constexpr (kMajor == Major::kK) return kOperandBytes;
        return image.across - 2 * tile > 1 ? kOperandBytes : kOperandBytes / 2;
    }
    template <Major kMajor>
    static DML_DEVICE void copy_operand(char* to, const Image& image, int tile, int slice, Mbarrier* full) {
        if constexpr (kMajor == Major::kK) {
            bulk_copy(to, Layout::block(image, tile, slice), kOperandBytes, full);
        } else {
            const int blocks = operand_bytes<kMajor>(image, tile) / (kParts * kHalfBytes);
            for (int block = 0; block < blocks; ++block) {
                const unsigned char* from =
                    Layout::block(image, slice / 2, 2 * tile + block) + slice % 2 * kHalfBytes;
                for (int part = 0; part < kParts; ++part) {
                    bulk_copy(to + part * kPartBytes + block * kHalfBytes, from + part * kPartBytes,
                              kHalfBytes, full);
                }
            }
        }
    }

    DML_DEVICE void release(int stage) {
        if (lane_id() == 0) mbarrier_arrive(&empty_[stage]);
    }

    // acc += A B of a slice, of these parts of the operands; or, unless it accumulates, acc = A B.
    static DML_DEVICE void multiply(float (&acc)[kWgmmaRegisters], uint64_t a, uint64_t b, int part_a,
                                    int part_b, bool accumulate) {
        a = offset_operand(a, part_a * kPartBytes);
        b = offset_operand(b, part_b * kPartBytes);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            wgmma<T, kA, kB>(acc, offset_operand(a, step * kStepBytes<kA>),
                             offset_operand(b, step * kStepBytes<kB>), accumulate || step > 0);
        }
    }

   public:
    static constexpr int kStagesBytes = kStages * kStageBytes;
    static constexpr int kSharedBytes = kStagesBytes + kStages * 2 * int(sizeof(Mbarrier));
    DML_DEVICE char* stages() const { return stages_; }

    DML_DEVICE TileProduct()
        : stages_(array<char>(0, kStages * kStageBytes)),
          full_(array<Mbarrier>(kStages * kStageBytes, kStages)),
          empty_(array<Mbarrier>(kStages * (kStageBytes + int(sizeof(Mbarrier))), kStages)) {}

    static DML_DEVICE bool is_producer() { return warp_id() == kConsumerWarps; }

    // By all threads of the block, first.
    DML_DEVICE void init_barriers() {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                mbarrier_init(&full_[stage], 1);
                mbarrier_init(&empty_[stage], kConsumerWarps);
            }
            fence_mbarrier_init();
        }
        block_sync();
    }

    // By the producer warp: slices of rows `tile_a` of A and columns `tile_b` of B.
    DML_DEVICE void produce(const Image& a, const Image& b, int tile_a, int tile_b, int slices) {
        if (lane_id() != 0) return;
        const int bytes = operand_bytes<kA>(a, tile_a) + operand_bytes<kB>(b, tile_b);
        Turn turn;
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice, turn.advance()) {
            char* const to = stages_ + turn.stage * kStageBytes;
            Mbarrier* const full = &full_[turn.stage];
            mbarrier_wait(&empty_[turn.stage], turn.parity ^ 1);  // in the first round nobody is waited for
            mbarrier_arrive_expect(full, bytes);
            copy_operand<kA>(to, a, tile_a, slice, full);
            copy_operand<kB>(to + kOperandBytes, b, tile_b, slice, full);
        }
    }

    // By the consumer warps: sums = the sum over slices, at least one, of this warpgroup's 64 x 128 tile.
    DML_DEVICE void consume(float (&sums)[kWgmmaRegisters], int slices) {
        const int warpgroup = warp_id() / 4;
        // Both kinds of operand A have their second 64 rows half a block behind the first.
        const uint64_t first_a = operand<kA>(stages_ + warpgroup * kHalfBytes, kHalfBytes);
        const uint64_t first_b = operand<kB>(stages_ + kOperandBytes, kHalfBytes);
        Turn turn;
#pragma unroll
        for (float& sum : sums) sum = 0.0f;
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice, turn.advance()) {
            const uint64_t a = offset_operand(first_a, turn.stage * kStageBytes);
            const uint64_t b = offset_operand(first_b, turn.stage * kStageBytes);
            mbarrier_wait(&full_[turn.stage], turn.parity);
            if constexpr (kParts == 1) {
                wgmma_fence(sums);
                multiply(sums, a, b, 0, 0, true);
                wgmma_commit();
                wgmma_wait<1>();  // for the slice before
                if (slice > 0) release(turn.stage_before());
            } else {
                float fresh[kWgmmaRegisters];
                wgmma_fence(fresh);
                multiply(fresh, a, b, 0, 1, false);
                multiply(fresh, a, b, 1, 0, true);
                wgmma_commit();
                wgmma_wait<0>(fresh);
#pragma unroll
                for (float& x : fresh) x *= kSmallScale;
                wgmma_fence(fresh);
                multiply(fresh, a, b, 0, 0, true);
                wgmma_commit();
                wgmma_wait<0>(fresh);
                release(turn.stage);
#pragma unroll
                for (int i = 0; i < kWgmmaRegisters; ++i) sums[i] += fresh[i];
            }
        }
        if constexpr (kParts == 1) wgmma_wait<0>(sums);
    }
};

}  // namespace dml::cuda
