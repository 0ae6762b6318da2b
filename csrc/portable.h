// What lets one header serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define DML_INLINE __host__ __device__ __forceinline__
#else
// always_inline, not just inline: the CPU kernels compile these headers once per instruction set,
// and an out-of-line copy made with AVX-512 must never be the one that the linker keeps for all.
#define DML_INLINE inline __attribute__((always_inline))
#endif
