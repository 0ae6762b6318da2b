// What the warp instructions compute, from the operands of all 32 lanes (see warp_rendezvous).
#pragma once

#include <cstdint>

namespace emulator {

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
