// Autograd helpers for callers of pair_loss.
#pragma once

#include "torch/ops.h"

namespace dml {

// The op through the dispatcher, so that autograd, autocast and transforms see the call.
ForwardResult dispatch_pair_loss(const Call& call);

// Whether the loss needs a graph to the points or the parameters.
bool needs_gradient(const Call& call);

// Whether x carries a tangent of forward-mode differentiation.
bool has_tangent(const at::Tensor& x);

}  // namespace dml
