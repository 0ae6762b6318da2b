// What lets one header serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define DML_INLINE __host__ __device__ __forceinline__
#else
// always_inline, not just inline: the CPU kernels compile these headers once per instruction set,
// and an out-of-line copy made with AVX-512 must never be the one that the linker keeps for all.
#define DML_INLINE inline __attribute__((always_inline))
#endif

// Goes before a function of both sides that calls what it is given, which may be of either.
#if defined(__CUDACC__)
#define DML_CALLS_EITHER _Pragma("nv_exec_check_disable")
#else
#define DML_CALLS_EITHER
#endif

// Unrolls the loop that follows, on the host; nvcc unrolls loops of known length by itself.
#if defined(__CUDACC__)
#define DML_UNROLL(n)
#else
#define DML_PRAGMA(text) _Pragma(#text)
#define DML_UNROLL(n) DML_PRAGMA(GCC unroll n)
#endif

namespace dml {

// a * b, rounded. A compiler may otherwise merge the product with a later subtraction into one fused
// operation that does not round it; then logit - max, for the pair whose logit is the maximum, is no
// longer 0 but the rounding error of a number in the hundreds, which the exponential makes visible.
template <typename T>
DML_INLINE T rounded_product(T a, T b) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 8) {
        return __dmul_rn(a, b);
    } else {
        return __fmul_rn(a, b);
    }
#else
    return a * b;  // the CPU kernels store logits before they use them, which rounds them
#endif
}

}  // namespace dml
