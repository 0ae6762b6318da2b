// Memory for one tile, kept by each thread.
#pragma once

#include <memory>

#include "cpu/kernels/tile_kernels.h"

namespace dml::cpu {

template <typename T>
struct alignas(64) Scratch {
    T tile[kMostSide * kMostSide];

    // The calling thread's, kept from call to call: for a small batch, touching fresh memory would cost as
    // much as the work.
    static Scratch& mine() {
        static thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
        return *scratch;
    }
};

}  // namespace dml::cpu
