// What of autograd concerns whoever calls pair_loss.
#pragma once

#include "torch/ops.h"

namespace dml {

// The op, by way of the dispatcher: whatever is under way sees the call.
ForwardResult dispatch_pair_loss(const Call& call);

// Whether a gradient by the points may be asked for.
bool needs_gradient(const at::Tensor& embeddings, const OptionalTensor& ref_emb);

// Whether a derivative in forward mode is under way.
bool has_tangent(const at::Tensor& x);

}  // namespace dml
