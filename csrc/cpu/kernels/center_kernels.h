// The loops of losses with several centres a class over a row's similarities, as a table of function pointers:
// one table for each scalar type and instruction set.
#pragma once

#include <cstdint>

#include "core/centers.h"

namespace dml::cpu {

// Classes that are visited together.
inline constexpr int64_t kCenterChunk = 128;

template <typename T>
struct CenterKernels {
    // A row of a block, by CenterLoss. scratch: [kCenterChunk * per_class]. forward adds to the row's numbers and
    // leaves the products scaled. backward turns products into weights; by_params: null, or [kCenterParams], to
    // which the derivatives of the row's loss are added. grad: the upstream gradient.
    void (*forward[2])(const CenterBlock<T>&, const CenterParams& params, int64_t row, T* scratch,
                       CenterRow<T>&);
    void (*backward[2])(const CenterBlock<T>&, const CenterParams& params, int64_t row, T* scratch, T grad,
                        const SavedCenters<const T>& saved, double* by_params);
};

// The table for the instruction set in use.
template <typename T>
const CenterKernels<T>& center_kernels();

}  // namespace dml::cpu
