// __half and __nv_bfloat16 for the host: two bytes each, converted with round-to-nearest-even.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_language.h"

namespace emulator {

inline float half_bits_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 31u;
    const uint32_t mantissa = bits & 0x3ffu;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) {  // subnormal: mantissa * 2^-24, exact in a float
        const float magnitude = float(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return bits_as<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half_bits(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return 0x7fffu;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;  // rounds beyond the largest half
    if (magnitude < 0x1p-14f) {                        // subnormal, in units of 2^-24
        return sign | uint16_t(std::nearbyint(magnitude * 0x1p24f));
    }
    const uint32_t half_ulp_to_even = 0xfffu + ((bits >> 13) & 1u);
    return sign | uint16_t((((bits & 0x7fffffffu) + half_ulp_to_even) >> 13) - (112u << 10));
}

inline float bfloat16_bits_to_float(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

inline uint16_t float_to_bfloat16_bits(float value) {
    if (std::isnan(value)) return 0x7fffu;
    const uint32_t bits = bits_as<uint32_t>(value);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace emulator

struct __half {
    uint16_t bits;

    __half() = default;
    __half(float value) : bits(emulator::float_to_half_bits(value)) {}
    operator float() const { return emulator::half_bits_to_float(bits); }
};

struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float value) : bits(emulator::float_to_bfloat16_bits(value)) {}
    operator float() const { return emulator::bfloat16_bits_to_float(bits); }
};

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
