#include "warp_math.h"

#include <cstring>
#include <vector>

#include "float16.h"

namespace emulator {
namespace {

constexpr int kLanes = 32;

template <typename T>
T& operand(void* const operands[], int lane) {
    return *static_cast<T*>(operands[lane]);
}

const float* half_table() {
    static const std::vector<float> table = [] {
        std::vector<float> all(1 << 16);
        for (int bits = 0; bits < 1 << 16; ++bits) all[bits] = half_bits_to_float(uint16_t(bits));
        return all;
    }();
    return table.data();
}

// acc += A B, with A 16 x K by rows and B K x 8 by rows.
template <int K>
void multiply(void* const operands[], const float (&a)[16][K], const float (&b)[K][8]) {
    float sum[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const float* acc = operand<Multiply>(operands, lane).acc;
        const int g = lane / 4;
        const int t = lane % 4;
        sum[g][2 * t] = acc[0];
        sum[g][2 * t + 1] = acc[1];
        sum[g + 8][2 * t] = acc[2];
        sum[g + 8][2 * t + 1] = acc[3];
    }
    multiply_truncated(sum, a, b);
    for (int lane = 0; lane < kLanes; ++lane) {
        float* acc = operand<Multiply>(operands, lane).acc;
        const int g = lane / 4;
        const int t = lane % 4;
        acc[0] = sum[g][2 * t];
        acc[1] = sum[g][2 * t + 1];
        acc[2] = sum[g + 8][2 * t];
        acc[3] = sum[g + 8][2 * t + 1];
    }
}

template <typename ToFloat>
void multiply_16_bit(void* const operands[], ToFloat to_float) {
    float a[16][16];
    float b[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Multiply& request = operand<Multiply>(operands, lane);
        const int g = lane / 4;
        const int t = lane % 4;
        for (int half = 0; half < 2; ++half) {  // of a register: the neighbours along k
            const int shift = 16 * half;
            a[g][2 * t + half] = to_float(uint16_t(request.a[0] >> shift));
            a[g + 8][2 * t + half] = to_float(uint16_t(request.a[1] >> shift));
            a[g][2 * t + 8 + half] = to_float(uint16_t(request.a[2] >> shift));
            a[g + 8][2 * t + 8 + half] = to_float(uint16_t(request.a[3] >> shift));
            b[2 * t + half][g] = to_float(uint16_t(request.b[0] >> shift));
            b[2 * t + 8 + half][g] = to_float(uint16_t(request.b[1] >> shift));
        }
    }
    multiply<16>(operands, a, b);
}

}  // namespace

void shuffle(void* const operands[]) {
    uint64_t values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = operand<Shuffle>(operands, lane).value;
    for (int lane = 0; lane < kLanes; ++lane) {
        Shuffle& request = operand<Shuffle>(operands, lane);
        request.value = values[request.source % kLanes];
    }
}

void vote(void* const operands[]) {
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        bits |= uint32_t(operand<Vote>(operands, lane).predicate) << lane;
    }
    for (int lane = 0; lane < kLanes; ++lane) operand<Vote>(operands, lane).result = bits;
}

void load_matrix(void* const operands[]) {
    const LoadMatrix& first = operand<LoadMatrix>(operands, 0);
    for (int matrix = 0; matrix < first.matrices; ++matrix) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row) {
            std::memcpy(element[row], operand<LoadMatrix>(operands, 8 * matrix + row).row, 16);
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4;
            const int t = lane % 4;
            const uint32_t low = first.transposed ? element[2 * t][g] : element[g][2 * t];
            const uint32_t high = first.transposed ? element[2 * t + 1][g] : element[g][2 * t + 1];
            operand<LoadMatrix>(operands, lane).registers[matrix] = low | (high << 16);
        }
    }
}

void multiply_half(void* const operands[]) {
    const float* table = half_table();
    multiply_16_bit(operands, [table](uint16_t bits) { return table[bits]; });
}

void multiply_bfloat16(void* const operands[]) {
    multiply_16_bit(operands, [](uint16_t bits) { return bfloat16_bits_to_float(bits); });
}

void multiply_tf32(void* const operands[]) {
    const auto to_float = [](uint32_t bits) { return bits_as<float>(bits & 0xffffe000u); };
    float a[16][8];
    float b[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Multiply& request = operand<Multiply>(operands, lane);
        const int g = lane / 4;
        const int t = lane % 4;
        a[g][t] = to_float(request.a[0]);
        a[g + 8][t] = to_float(request.a[1]);
        a[g][t + 4] = to_float(request.a[2]);
        a[g + 8][t + 4] = to_float(request.a[3]);
        b[t][g] = to_float(request.b[0]);
        b[t + 4][g] = to_float(request.b[1]);
    }
    multiply<8>(operands, a, b);
}

}  // namespace emulator
