// Macros and functions that let one header serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define DML_INLINE __host__ __device__ __forceinline__
#else
// always_inline: the CPU kernels compile these headers once per instruction set, and the linker must never
// keep an out-of-line copy with AVX-512 instructions for all of them.
#define DML_INLINE inline __attribute__((always_inline))
#endif

// After the parameters of a lambda, on the host: out of line it would lack the instruction set of the function
// that it stands in.
#define DML_INLINE_LAMBDA __attribute__((always_inline))

// Before a __host__ __device__ function that calls its argument, which may be of either side.
#if defined(__CUDACC__)
#define DML_CALLS_EITHER _Pragma("nv_exec_check_disable")
#else
#define DML_CALLS_EITHER
#endif

// Unrolls the next loop on the host; nvcc unrolls loops of known length by itself.
#if defined(__CUDACC__)
#define DML_UNROLL(n)
#else
#define DML_PRAGMA(text) _Pragma(#text)
#define DML_UNROLL(n) DML_PRAGMA(GCC unroll n)
#endif

namespace dml {

// a * b, rounded. Otherwise a compiler may fuse the product with a later subtraction. Then logit - max is not
// 0 for the pair with the largest logit but the rounding error of a number in the hundreds, and the
// exponential shows it.
template <typename T>
DML_INLINE T rounded_product(T a, T b) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 8) {
        return __dmul_rn(a, b);
    } else {
        return __fmul_rn(a, b);
    }
#else
    return a * b;  // the CPU kernels round logits by storing them first (range_terms)
#endif
}

}  // namespace dml
