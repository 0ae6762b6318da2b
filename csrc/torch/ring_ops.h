// What the ops on blocks of columns share on every device (cpu/pairs/ring.cpp, torch/cuda_ring.cpp): the
// checks.
#pragma once

#include "torch/ops.h"

namespace dml {

// ref_emb is the block, and self_index names each row's own column in it, or -1.
inline void check_block(const Call& c) {
    TORCH_CHECK_VALUE(c.ref_emb, "ref_emb: expected a block of columns");
    TORCH_CHECK_VALUE(!c.num_valid_refs, "num_valid_refs: expected none with a block of columns");
    TORCH_CHECK_VALUE(!c.mine_self_pair, "mine_self_pair: expected false with a block of columns");
    TORCH_CHECK_VALUE(!c.both_directions && !c.row_weights,
                      "both_directions, row_weights: expected neither with a block of columns");
    check_inputs(c);
}

// The gradients of the rows, of the block and of dynamic_params.
using BlockGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline void check_pair_counts(const at::Tensor& pairs) {
    TORCH_CHECK_VALUE(pairs.dim() == 2 && pairs.size(0) == 2 && pairs.scalar_type() == at::kLong,
                      "pairs: expected int64 of shape [2, N], got ", pairs.scalar_type(), " ", pairs.sizes());
}

}  // namespace dml
