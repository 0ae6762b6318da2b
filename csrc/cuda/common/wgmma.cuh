// Products of a warpgroup (four warps, the first a multiple of four) of operands in shared memory, which run beside
// the threads; sm_90a only.
//
//   wgmma_fence(acc); wgmma(acc, a, b, ..); .. wgmma_commit(); wgmma_wait<0>(acc);
//
// All warps of the warpgroup execute all of these in the same order. From a wgmma to the wait for its group the
// accumulators belong to the tensor cores and shared memory that it reads must not change.
//
// acc is the warpgroup's 64 x 128 tile. Warp w has rows 16 w .. 16 w + 15 of it; with g = lane / 4 and t = lane % 4,
// registers 4 j .. 4 j + 3 hold of columns 8 j .. 8 j + 7 what those of mma hold (primitives.cuh):
// (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1). See fragment_row and fragment_column.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/swizzle.cuh"

namespace dml {

inline constexpr int kWgmmaM = 64, kWgmmaN = 128, kWgmmaK = 16;
inline constexpr int kWarpgroupSize = 128;
inline constexpr int kWgmmaRegisters = kWgmmaM * kWgmmaN / kWarpgroupSize;

// Along which of its dimensions the elements of an operand are neighbours in memory. The values are PTX's
// imm-trans-a and imm-trans-b.
enum class Major {
    kK = 0,   // rows of A, or columns of B, as rows of an image
    kMn = 1,  // rows of an image are k: A or B "transposed"
};

}  // namespace dml

#if defined(DML_CUDA_ON_HOST)
#include "../../../tests/emulator/wgmma_on_host.h"
#else

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma.cuh is for sm_90a: compile with -gencode arch=compute_90a,code=sm_90a"
#endif

namespace dml {

// As shared_array, of shared memory that begins on a multiple of 1024, as patterns of the swizzle do. A kernel takes
// all its arrays from the one or from the other.
template <typename T>
DML_DEVICE T* pattern_aligned_array(int byte_offset, int count) {
    extern __shared__ __align__(1024) unsigned char dml_pattern_aligned_shared[];
    (void)count;
    return reinterpret_cast<T*>(dml_pattern_aligned_shared + byte_offset);
}

// The compiler may not keep acc elsewhere, or move its use, across this.
template <int N>
DML_DEVICE void pin_registers(float (&acc)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// Orders what threads did with acc before the wgmma that follow. Needed before the first one, and again after
// threads have touched acc; not between wgmma on the same acc. ptxas adds one before each loop's wgmma that lack it
// (C7519), so loops have it before every group.
DML_DEVICE void wgmma_fence(float (&acc)[kWgmmaRegisters]) {
    pin_registers(acc);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the warpgroup's group of wgmma.
DML_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most Pending of the newest groups are still under way.
template <int Pending>
DML_DEVICE void wgmma_wait() {
    static_assert(Pending >= 0 && Pending <= 7, "wgmma.wait_group takes 0 to 7");
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The same, of the groups on acc, which the threads read next.
template <int Pending>
DML_DEVICE void wgmma_wait(float (&acc)[kWgmmaRegisters]) {
    wgmma_wait<Pending>();
    pin_registers(acc);
}

#define DML_EIGHT(i)                                                                                        \
    "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
        "+f"(acc[i + 6]), "+f"(acc[i + 7])

#define DML_WGMMA(type)                                                                           \
    asm volatile(                                                                                 \
        "{\n"                                                                                     \
        ".reg .pred p;\n"                                                                         \
        "setp.ne.b32 p, %66, 0;\n"                                                                \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                              \
        " "                                                                                       \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "        \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "        \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
        "%64, %65, p, 1, 1, %67, %68;\n"                                                          \
        "}"                                                                                       \
        : DML_EIGHT(0), DML_EIGHT(8), DML_EIGHT(16), DML_EIGHT(24), DML_EIGHT(32), DML_EIGHT(40), \
          DML_EIGHT(48), DML_EIGHT(56)                                                            \
        : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)))

// acc = A B, or acc += A B: A is 64 x 16 and B is 16 x 128, of T in __half, __nv_bfloat16, as descriptors say.
template <typename T, Major kA, Major kB>
DML_DEVICE void wgmma(float (&acc)[kWgmmaRegisters], uint64_t a, uint64_t b, bool accumulate = true) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16-bit operands");
    if constexpr (std::is_same_v<T, __half>) {
        DML_WGMMA("f16");
    } else {
        DML_WGMMA("bf16");
    }
}

#undef DML_WGMMA
#undef DML_EIGHT

}  // namespace dml

#endif  // DML_CUDA_ON_HOST

namespace dml {

// ---- descriptors of operands --------------------------------------------------------------------------------

// The matrix descriptor (PTX ISA, "Matrix Descriptor Format"): where an operand of one wgmma lies. Fields of an
// address or a distance hold bits 4-17 of it, so all are multiples of 16:
//
//   bits  0-13  start address
//   bits 16-29  leading dimension byte offset
//   bits 32-45  stride dimension byte offset
//   bits 49-51  base offset: 0, as patterns begin on multiples of 1024
//   bits 62-63  swizzle: 0 none, 1 of 128 bytes, 2 of 64, 3 of 32
//
// What the two distances are depends on the layout (PTX ISA, "Strides"). In the 128-byte swizzle, of which a
// pattern is eight rows of 128 bytes:
//
//   K-major   a row is k. stride: from eight rows (of M or N) to the next. leading: unused
//   MN-major  a row is 64 of M or N, eight rows are k. stride: from eight k to the next.
//             leading: from 64 of M or N to the next
//
// The hardware adds up an element's address, then swizzles the sum. So an operand may begin inside a pattern's
// first row, as K-major ones do that are not the first along k.
DML_DEVICE uint64_t matrix_descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes) {
    constexpr uint64_t kSwizzle128 = 1;
    const auto encoded = [](uint32_t bytes) { return uint64_t((bytes & 0x3ffffu) >> 4); };
    return encoded(shared_address(start)) | encoded(leading_bytes) << 16 | encoded(stride_bytes) << 32 |
           kSwizzle128 << 62;
}

// An operand of which 64 (of M or N) x 16 begins at `tile`, and 64 more of M or N `next_columns` bytes behind where
// it is MN-major.
template <Major kMajor>
DML_DEVICE uint64_t operand(const void* tile, uint32_t next_columns) {
    return matrix_descriptor(tile, kMajor == Major::kMn ? next_columns : 16, kPatternBytes);
}

// From an operand to the same one 16 further along k: 32 bytes within rows, or 16 rows.
template <Major kMajor>
inline constexpr int kStepBytes = kMajor == Major::kK ? kWgmmaK * 2 : kWgmmaK * kSwizzleBytes;

// The same operand so many bytes further: a multiple of 16, in the same 256 KB.
DML_DEVICE uint64_t offset_operand(uint64_t descriptor, int bytes) {
    return descriptor + uint64_t(bytes >> 4);
}

// ---- accumulators --------------------------------------------------------------------------------------------

// The row and column of the warpgroup's 64 x 128 tile that register i of this thread of it holds.
DML_DEVICE int fragment_row(int thread, int i) {
    return thread / kWarpSize * 16 + thread % kWarpSize / 4 + i / 2 % 2 * 8;
}
DML_DEVICE int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace dml
