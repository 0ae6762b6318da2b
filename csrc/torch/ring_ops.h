// What the ops on blocks of columns (cpu/blocks.cpp, cuda_blocks.cpp) share.
#pragma once

#include "torch/ops.h"

namespace dml {

// The arguments that all of these ops have of a Call.
struct BlockCall {
    OptionalTensor block, block_labels, self_index, none;
    Call call;

    BlockCall(const at::Tensor& embeddings, const at::Tensor& labels, const at::Tensor& block_,
              const at::Tensor& block_labels_, const OptionalTensor& self_index_, std::string_view formula,
              at::ArrayRef<double> params, std::optional<double> epsilon, std::string_view similarity,
              std::string_view reduction)
        : block(block_),
          block_labels(block_labels_),
          self_index(self_index_),
          call{embeddings, labels,  block,      block_labels, self_index, none, formula,
               params,     epsilon, similarity, reduction,    false,      true, true} {
        check_inputs(call);
    }
};

inline void check_pair_counts(const at::Tensor& pairs) {
    TORCH_CHECK_VALUE(pairs.dim() == 2 && pairs.size(0) == 2 && pairs.scalar_type() == at::kLong,
                      "pairs: expected int64 of shape [2, N], got ", pairs.scalar_type(), " ", pairs.sizes());
}

}  // namespace dml
