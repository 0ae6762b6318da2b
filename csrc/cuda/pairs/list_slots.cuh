// Which of many pieces of work a block has, in order.
#pragma once

#include "cuda/common/primitives.cuh"

namespace dml::cuda {

// Lists in order the slots for which wanted(slot) holds; list[0] is their number. One warp works for the
// block.
template <typename F>
DML_DEVICE void list_slots(int* list, int slots, const F& wanted) {
    if (warp_id() == 0) {
        int count = 0;
#pragma unroll 1
        for (int first = 0; first < slots; first += kWarpSize) {
            const int slot = first + lane_id();
            const bool listed = slot < slots && wanted(slot);
            const uint32_t all = warp_ballot(listed), before = all & ((1u << lane_id()) - 1u);
            if (listed) list[1 + count + __popc(before)] = slot;
            count += __popc(all);
        }
        if (lane_id() == 0) list[0] = count;
    }
    block_sync();
}

}  // namespace dml::cuda
