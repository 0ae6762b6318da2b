// A tile of 128 x 128 of a product of two images, on the tensor cores of a multiprocessor of sm_90a.
//
// A producer warp copies slices of 64 along k into a ring of stages, and two consumer warpgroups multiply them, 64 rows
// of the tile each. A stage's `full` mbarrier tells consumers that its bytes have landed, `empty` tells the producer
// that all consumer warps are done with them. Phases of both are counted by rounds of the ring.
//
// Operands come K-major (an image's rows are rows of the tile, or columns) or MN-major (its rows are k), so that the
// image of points is the operand of their similarities, and of weights times points.
//
// Tensor cores truncate their sums. Where these are joined, a slice's product is summed from 0 and joins the others by a
// rounded addition, times a power of two for its rows. With two parts, x = big + 2^-11 small, it is big big +
// 2^-11 (big small + small big).
#pragma once

#include "cuda/common/images.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/hopper/wgmma_choice.h"

namespace dml::cuda {

inline constexpr int kSliceDepth = 64, kStages = 3;
inline constexpr int kConsumerWarps = 8, kConsumers = kConsumerWarps * kWarpSize;
static_assert(kWgmmaThreads == kConsumers + kWarpSize, "consumers, and the producer");

// Where a slice of an operand lies in its image. K-major: the rows of a tile in one block. MN-major: half the rows of a
// tile, in two blocks side by side.
struct SlicePlace {
    int tile, block, half;
};

// A power of two for each of the two rows that a thread has of a slice's product: WgmmaTile::row(0) and row(2).
struct RowScales {
    float of[2];
};

template <typename T, int kParts, bool kJoins = kParts == 2>
class TileProduct {
    static_assert(kParts == 1 || (kParts == 2 && kJoins), "whole, or big and small parts");
    using Layout = ImageLayout<T, kProductTile, kParts>;
    static constexpr int kPartBytes = Layout::kPartBytes;
    static constexpr int kOperandBytes = Layout::kBlockBytes;  // 128 x 64, or 64 x 128
    static constexpr int kStageBytes = 2 * kOperandBytes;      // A, then B
    static constexpr int kHalfBytes = kPartBytes / 2;          // 64 rows of a block
    static constexpr int kSteps = kSliceDepth / kWgmmaK;

    // A place in the ring of stages, and the parity of the phases of its round.
    struct Turn {
        int stage = 0, parity = 0;
        DML_DEVICE void advance() {
            stage = stage + 1 == kStages ? 0 : stage + 1;
            parity ^= stage == 0;
        }
        DML_DEVICE int stage_before() const { return stage == 0 ? kStages - 1 : stage - 1; }
    };

    char* stages_;
    Mbarrier* full_;
    Mbarrier* empty_;
    Turn turn_;  // of the producer, or of a consumer

    template <typename U>
    static DML_DEVICE U* array(int byte_offset, int count) {
        return pattern_aligned_array<U>(byte_offset, count);
    }

    // Blocks of a slice. If an MN-major one has no second block its place is left as it is: what comes of it lies past
    // the edge.
    template <Major kMajor>
    static DML_DEVICE int blocks_of(const Image& image, SlicePlace place) {
        return kMajor == Major::kMn && place.block + 1 < image.across ? 2 : 1;
    }
    template <Major kMajor>
    static DML_DEVICE int bytes_of(const Image& image, SlicePlace place) {
        return kMajor == Major::kK ? kOperandBytes : blocks_of<kMajor>(image, place) * kParts * kHalfBytes;
    }
    template <Major kMajor>
    static DML_DEVICE void copy_operand(char* to, const Image& image, SlicePlace place, Mbarrier* full) {
        if constexpr (kMajor == Major::kK) {
            bulk_copy(to, Layout::block(image, place.tile, place.block), kOperandBytes, full);
        } else {
            for (int block = 0; block < blocks_of<kMajor>(image, place); ++block) {
                const unsigned char* from =
                    Layout::block(image, place.tile, place.block + block) + place.half * kHalfBytes;
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
    template <Major kA, Major kB>
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
        : stages_(array<char>(0, kStagesBytes)),
          full_(array<Mbarrier>(kStagesBytes, kStages)),
          empty_(array<Mbarrier>(kStagesBytes + kStages * int(sizeof(Mbarrier)), kStages)) {}

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

    // By the producer warp, for each consume: place_a(slice) and place_b(slice) of the two operands.
    template <Major kA, Major kB, typename PlaceA, typename PlaceB>
    DML_DEVICE void produce(const Image& a, const PlaceA& place_a, const Image& b, const PlaceB& place_b,
                            int slices) {
        if (lane_id() != 0) return;
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice, turn_.advance()) {
            const SlicePlace at_a = place_a(slice), at_b = place_b(slice);
            char* const to = stages_ + turn_.stage * kStageBytes;
            Mbarrier* const full = &full_[turn_.stage];
            mbarrier_wait(&empty_[turn_.stage], turn_.parity ^ 1);  // in the first round nobody is waited for
            const int bytes = bytes_of<kA>(a, at_a) + bytes_of<kB>(b, at_b);
            mbarrier_arrive_expect(full, bytes);
            copy_operand<kA>(to, a, at_a, full);
            copy_operand<kB>(to + kOperandBytes, b, at_b, full);
        }
    }

    // By the consumer warps: adds the slices' product to sums, of this warpgroup's 64 x 128 tile. scales(slice): the
    // RowScales of this thread, where products are joined.
    template <Major kA, Major kB, typename Scales>
    DML_DEVICE void consume(float (&sums)[kWgmmaRegisters], int slices, const Scales& scales) {
        const int warpgroup = warp_id() / 4;
        // Both kinds of operand A have their second 64 rows half a block behind the first.
        const uint64_t first_a = operand<kA>(stages_ + warpgroup * kHalfBytes, kHalfBytes);
        const uint64_t first_b = operand<kB>(stages_ + kOperandBytes, kHalfBytes);
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice, turn_.advance()) {
            const uint64_t a = offset_operand(first_a, turn_.stage * kStageBytes);
            const uint64_t b = offset_operand(first_b, turn_.stage * kStageBytes);
            RowScales scale;
            if constexpr (kJoins) scale = scales(slice);
            mbarrier_wait(&full_[turn_.stage], turn_.parity);
            if constexpr (!kJoins) {
                wgmma_fence(sums);
                multiply<kA, kB>(sums, a, b, 0, 0, true);
                wgmma_commit();
                wgmma_wait<1>();  // for the slice before
                if (slice > 0) release(turn_.stage_before());
            } else {
                float fresh[kWgmmaRegisters];
                wgmma_fence(fresh);
                if constexpr (kParts == 2) {
                    multiply<kA, kB>(fresh, a, b, 0, 1, false);
                    multiply<kA, kB>(fresh, a, b, 1, 0, true);
                    wgmma_commit();
                    wgmma_wait<0>(fresh);
#pragma unroll
                    for (float& x : fresh) x *= kSmallScale;
                    wgmma_fence(fresh);
                }
                multiply<kA, kB>(fresh, a, b, 0, 0, kParts == 2);
                wgmma_commit();
                wgmma_wait<0>(fresh);
                release(turn_.stage);
#pragma unroll
                for (int i = 0; i < kWgmmaRegisters; ++i)
                    sums[i] = std::fma(fresh[i], scale.of[i / 2 % 2], sums[i]);
            }
        }
        if constexpr (!kJoins) {
            wgmma_wait<0>(sums);
            if (slices > 0) release(turn_.stage_before());
        }
    }
};

// The tile of a warpgroup's accumulators, as Product has it.
struct WgmmaTile {
    static constexpr int kRun = 2;
    const float (&sums)[kWgmmaRegisters];

    // The row and column of the tile that sums[i] of this thread is of.
    static DML_DEVICE int row(int i) {
        const int thread = int(threadIdx.x);
        return thread / kWarpgroupSize * kWgmmaM + fragment_row(thread % kWarpgroupSize, i);
    }
    static DML_DEVICE int column(int i) { return fragment_column(int(threadIdx.x) % kWarpgroupSize, i); }

    template <typename F>
    DML_DEVICE void for_each_run(const F& f) const {
#pragma unroll
        for (int i = 0; i < kWgmmaRegisters; i += 2) {
            const float run[2] = {sums[i], sums[i + 1]};
            f(row(i), column(i), run);
        }
    }
};

}  // namespace dml::cuda
