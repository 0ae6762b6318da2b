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

BackwardResult pair_loss_backward(const Call& call, const Tensor& grad_loss, const Tensor& saved,
                                  bool need_emb, bool need_ref, bool need_params) {
    check_inputs(call);
    const auto run = call.embeddings.scalar_type() == at::kDouble ? backward<double> : backward<float>;
    return run(call, grad_loss, saved, need_emb, need_ref, need_params);
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("pair_loss", &FlatOp<&pair_loss>::call);
    m.impl("pair_loss_backward", &FlatOp<&pair_loss_backward>::call);
}

}  // namespace dml::cpu
