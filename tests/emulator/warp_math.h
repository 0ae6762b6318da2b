// What the warp instructions compute, from the operands of all 32 lanes (see warp_rendezvous).
#pragma once

#include <cstdint>

#include "cuda_language.h"

namespace emulator {

// Tensor cores truncate a sum to float instead of rounding it; doing so here keeps the emulated
// error honest. (The hardware cuts somewhat earlier still, at the largest addend's last bit.)
inline float truncate_to_float(double x) {
    return float(bits_as<double>(bits_as<uint64_t>(x) & ~uint64_t(0x1fffffff)));
}

// acc += A B of one instruction, in rows, with the sums truncated.
template <int M, int N, int K>
void multiply_truncated(float (&acc)[M][N], const float (&a)[M][K], const float (&b)[K][N]) {
    for (int i = 0; i < M; ++i) {
        double sum[N];
        for (int j = 0; j < N; ++j) sum[j] = acc[i][j];
        for (int k = 0; k < K; ++k) {
            for (int j = 0; j < N; ++j) sum[j] += double(a[i][k]) * double(b[k][j]);
        }
        for (int j = 0; j < N; ++j) acc[i][j] = truncate_to_float(sum[j]);
    }
}

struct Shuffle {
    uint64_t value;
    int source;  // lane
};
void shuffle(void* const operands[]);

struct Vote {
    bool predicate;
    uint32_t result;  // bit l: lane l's predicate
};
void vote(void* const operands[]);

struct LoadMatrix {
    int matrices;
    bool transposed;
    unsigned char row[16];  // what stood at the address that this lane brought
    uint32_t* registers;
};
void load_matrix(void* const operands[]);

struct Multiply {
    float* acc;
    const uint32_t* a;
    const uint32_t* b;
};
void multiply_half(void* const operands[]);
void multiply_bfloat16(void* const operands[]);
void multiply_tf32(void* const operands[]);

}  // namespace emulator
