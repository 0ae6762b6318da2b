// The ops pair_loss and pair_loss_backward on the CPU.
#include <torch/library.h>

#include "cpu/pairs/pair_loss.h"

namespace dml::cpu {
namespace {

// Computes float64 in float64, other types in float32.
ForwardResult pair_loss(const Call& call) {
    check_inputs(call);
    return call.embeddings.scalar_type() == at::kDouble ? forward<double>(call) : forward<float>(call);
}

BackwardResult pair_loss_backward(const Call& call, const Backward& from) {
    check_inputs(call);
    return call.embeddings.scalar_type() == at::kDouble ? backward<double>(call, from)
                                                        : backward<float>(call, from);
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("pair_loss", &pair_loss_op<pair_loss>);
    m.impl("pair_loss_backward", &pair_loss_backward_op<pair_loss_backward>);
}

}  // namespace dml::cpu
