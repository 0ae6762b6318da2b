// wgmma.cuh for the emulator. Included by that, never directly.
#pragma once

#include <type_traits>

#include "wgmma.h"

namespace dml {

DML_DEVICE uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

template <typename T>
DML_DEVICE T* pattern_aligned_array(int byte_offset, int count) {
    return static_cast<T*>(emulator::shared_array(byte_offset, sizeof(T) * size_t(count), kPatternBytes));
}

DML_DEVICE void wgmma_fence(float (&acc)[kWgmmaRegisters], Site site = Site::here()) {
    emulator::wgmma_fence(acc, site);
}

template <typename T, Major kA, Major kB>
DML_DEVICE void wgmma(float (&acc)[kWgmmaRegisters], uint64_t a, uint64_t b, bool accumulate = true,
                      Site site = Site::here()) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16-bit operands");
    emulator::wgmma(
        {acc, a, b, kA == Major::kMn, kB == Major::kMn, std::is_same_v<T, __nv_bfloat16>, accumulate, site});
}

DML_DEVICE void wgmma_commit(Site site = Site::here()) { emulator::wgmma_commit(site); }

template <int Pending>
DML_DEVICE void wgmma_wait(Site site = Site::here()) {
    emulator::wgmma_wait(Pending, site);
}
template <int Pending>
DML_DEVICE void wgmma_wait(float (&)[kWgmmaRegisters], Site site = Site::here()) {
    emulator::wgmma_wait(Pending, site);
}

}  // namespace dml
