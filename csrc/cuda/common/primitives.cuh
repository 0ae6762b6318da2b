// Every PTX instruction and warp or block intrinsic of the kernels, each behind a small named
// function; sm_80 and up. Nothing else in csrc/cuda holds inline assembly but mbarrier.cuh and wgmma.cuh,
// which have what sm_90 added.
//
// With DML_CUDA_ON_HOST defined the same names come from the emulator (tests/emulator), which runs
// the kernels on the CPU. So a kernel calls these functions only, never an intrinsic directly.
//
// All warp functions are executed by all 32 lanes of the warp together.
//
// Fragments (PTX ISA, "Matrix fragments"), with g = lane / 4 and t = lane % 4. A is 16 x k and
// row-major, B is k x 8 and column-major (so both are read along k), the accumulator is 16 x 8:
//
//   acc[0..3]     (g, 2t)  (g, 2t+1)  (g+8, 2t)  (g+8, 2t+1)
//
//   f16, bf16, k = 16; a register holds two neighbours along k, the lower one in the low half:
//   a[0..3]       (g, 2t..)  (g+8, 2t..)  (g, 2t+8..)  (g+8, 2t+8..)
//   b[0..1]       (k = 2t.., n = g)  (k = 2t+8.., n = g)
//
//   tf32, k = 8; a register holds one float, of which the lower 13 bits are ignored:
//   a[0..3]       (g, t)  (g+8, t)  (g, t+4)  (g+8, t+4)
//   b[0..1]       (k = t, n = g)  (k = t+4, n = g)
//
// ldmatrix reads 8 x 16-byte matrices (8x8 of f16, 8x4 of tf32): lane l holds the address of row
// l % 8 of matrix l / 8 (x2: lanes 0-15 count), and register i receives, of matrix i, the 4 bytes at
// row g, byte 4t. These are the layouts of a and b above when the rows run along k. With trans,
// register i receives the 16-bit elements (row 2t, column g) and (row 2t+1, column g): the layout of
// b when the rows run along n, for 16-bit elements only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace dml {

constexpr int kWarpSize = 32;

// The element type of a tf32 product; the operands are floats in 32-bit registers.
struct Tf32 {};

// How many elements along k one mma takes.
template <typename T>
constexpr int kMmaK = 16;
template <>
constexpr int kMmaK<Tf32> = 8;

}  // namespace dml

#if defined(DML_CUDA_ON_HOST)
#include "../../../tests/emulator/cuda_on_host.h"
#else

// torch's builder takes these away, for the sake of torch's own types.
#undef __CUDA_NO_HALF_OPERATORS__
#undef __CUDA_NO_HALF_CONVERSIONS__
#undef __CUDA_NO_HALF2_OPERATORS__
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DML_DEVICE __device__ __forceinline__

namespace dml {

DML_DEVICE int lane_id() { return int(threadIdx.x) % kWarpSize; }
DML_DEVICE int warp_id() { return int(threadIdx.x) / kWarpSize; }

// ---- barriers and fences ----------------------------------------------------------------------

DML_DEVICE void block_sync() { __syncthreads(); }
DML_DEVICE void warp_sync() { __syncwarp(); }

// ---- between kernels --------------------------------------------------------------------------

// First thing in every block of a kernel that Launches launches: waits until the kernel before it has ended and its
// writes are visible. Nothing in code for older GPUs, which it launches as others.
DML_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In the kernel before it, after its own wait: once all blocks have said so, or ended, the next one may be brought in.
DML_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- shared memory ----------------------------------------------------------------------------

// The array at this byte of dynamic shared memory: the only shared memory of the kernels. An offset always
// names the same array; to reuse its bytes in a later phase, cast the pointer. (On the host every array is a
// heap block of its own, so that overruns are seen.)
template <typename T>
DML_DEVICE T* shared_array(int byte_offset, int count) {
    extern __shared__ __align__(128) unsigned char dml_dynamic_shared[];
    (void)count;
    return reinterpret_cast<T*>(dml_dynamic_shared + byte_offset);
}

DML_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- asynchronous copies ----------------------------------------------------------------------

// Starts a copy of Bytes (4, 8 or 16) from global to shared memory, both aligned to Bytes. Only the
// first valid_bytes are read; the rest becomes zero, so 0 is a plain zero-fill that reads nothing.
// The bytes are there for this thread after cp_async_wait, for others after a barrier that follows.
template <int Bytes>
DML_DEVICE void cp_async(void* shared, const void* global, int valid_bytes = Bytes) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async moves 4, 8 or 16 bytes");
    if constexpr (Bytes == 16) {  // .cg passes by L1, and exists for 16 bytes only
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                     "l"(global), "r"(valid_bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                     "l"(global), "n"(Bytes), "r"(valid_bytes)
                     : "memory");
    }
}

// Closes this thread's group of copies.
DML_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most Pending of this thread's newest groups are still under way.
template <int Pending>
DML_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- matrix fragments -------------------------------------------------------------------------

DML_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

DML_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row)));
}

DML_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

DML_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row)));
}

// acc += A B for a 16 x 8 tile, T in __half, __nv_bfloat16, Tf32.
template <typename T>
DML_DEVICE void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
DML_DEVICE void mma<__half>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
DML_DEVICE void mma<__nv_bfloat16>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
DML_DEVICE void mma<Tf32>(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// acc = A B.
template <typename T>
DML_DEVICE void mma_from_zero(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, Tf32>) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
            : "=f"(acc[0]), "=f"(acc[1]), "=f"(acc[2]), "=f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
    } else {
        static_assert(std::is_same_v<T, __half>, "tf32 and float16");
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
            : "=f"(acc[0]), "=f"(acc[1]), "=f"(acc[2]), "=f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
    }
}

// ---- conversions ------------------------------------------------------------------------------

// Two floats rounded to nearest T (__half or __nv_bfloat16) in one register, `low` in the low half.
template <typename T>
DML_DEVICE uint32_t pack2(float low, float high);

template <>
DML_DEVICE uint32_t pack2<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

template <>
DML_DEVICE uint32_t pack2<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

// The two float16 numbers of such a register.
DML_DEVICE void unpack2(uint32_t pair, float& low, float& high) {
    const float2 both = __half22float2(reinterpret_cast<const __half2&>(pair));
    low = both.x;
    high = both.y;
}

// 2^x to about 2 units in the last place; subnormal results become 0.
DML_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- integers that several threads add to -----------------------------------------------------

// Integers only: floating-point sums must not depend on the order of threads.
DML_DEVICE void atomic_add(int32_t* sum, int32_t value) { atomicAdd(sum, value); }

// The number of tickets drawn before. What the block did before its barrier comes before this one, and what
// the blocks of those tickets did comes before what follows it.
DML_DEVICE unsigned take_ticket(unsigned* tickets) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(tickets) : "memory");
    return before;
}

// ---- between the lanes of a warp --------------------------------------------------------------

// T of 4 or 8 bytes.
template <typename T>
DML_DEVICE T shfl_xor(T value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

template <typename T>
DML_DEVICE T shfl(T value, int source_lane) {
    return __shfl_sync(0xffffffffu, value, source_lane);
}

DML_DEVICE uint32_t warp_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
DML_DEVICE bool warp_any(bool predicate) { return __any_sync(0xffffffffu, predicate); }

}  // namespace dml

#endif  // DML_CUDA_ON_HOST

namespace dml {

// x rounded to tf32 (10 stored mantissa bits, ties away from zero), as the bits of a float whose lower
// 13 bits mean nothing: good for mma only, which ignores them. Integer arithmetic, several times faster
// than cvt. Infinity stays what it is; a NaN may not.
DML_DEVICE uint32_t to_tf32(float x) { return __float_as_uint(x) + 0x1000u; }

// x as the sum of two tf32 numbers, for float32 accuracy from tf32 products (big big + big small +
// small big). big is x rounded to nearest, small the exact rest, of which mma keeps 11 bits:
// together they are x to 2^-23.
DML_DEVICE void split_tf32(float x, uint32_t& big, uint32_t& small) {
    big = to_tf32(x) & 0xffffe000u;
    small = __float_as_uint(x - __uint_as_float(big));
}

// warp_id, of which the compiler knows that all lanes have the same. What hangs on it does not diverge, and shuffles
// there need no code for the case.
DML_DEVICE int uniform_warp_id() { return shfl(warp_id(), 0); }

// ---- float16 parts ----------------------------------------------------------------------------

inline constexpr float kSmallScale = 1.0f / 2048;  // what the small parts are multiplied by

// The power of two that brings a number, the largest of its kind, to 2^13 .. 2^14; 1 for 0. It and its reciprocal are
// in the range of floats.
DML_DEVICE float scale_up(float largest) {
    if (largest == 0.0f) return 1.0f;
    const int exponent = int(__float_as_uint(largest) >> 23 & 255u), up = 267 - exponent;
    return __uint_as_float(uint32_t(up < 253 ? up : 253) << 23);
}
DML_DEVICE float reciprocal_of_power(float power) {
    return __uint_as_float((254u << 23) - __float_as_uint(power));
}

// Two floats as parts, x = big + small / 2048, to the larger of 2^-23 |x| and 2^-36.
DML_DEVICE void split_half2(float x, float y, uint32_t& big, uint32_t& small) {
    big = pack2<__half>(x, y);
    float big_x, big_y;
    unpack2(big, big_x, big_y);
    small = pack2<__half>((x - big_x) * 2048.0f, (y - big_y) * 2048.0f);
}

}  // namespace dml
