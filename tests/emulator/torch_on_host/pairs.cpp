// csrc/cuda_ops.cpp for CPU tensors, with the kernels of the emulator: pair_loss as
// dml_cuda_pair_loss_on_host.
#include <torch/library.h>

// The file's own registration, for CUDA tensors, becomes a function that nobody calls.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "no_custom_formulas.h"
#include "torch/cuda_pairs.cpp"

TORCH_LIBRARY(dml_cuda_pair_loss_on_host, m) {
    m.def(
        "pair_loss(Tensor embeddings, Tensor labels, Tensor? ref_emb, Tensor? ref_labels, Tensor? "
        "self_index, "
        "Tensor? num_valid_refs, str formula, float[] params, float? epsilon, str similarity, str reduction, "
        "bool mine_self_pair, bool divide, bool save_for_backward) -> (Tensor loss, Tensor saved)",
        &dml::pair_loss_op<dml::cuda::pair_loss>);
    m.def(
        "pair_loss_backward(Tensor grad_loss, Tensor embeddings, Tensor labels, Tensor? ref_emb, "
        "Tensor? ref_labels, Tensor? self_index, Tensor? num_valid_refs, Tensor saved, str formula, float[] "
        "params, "
        "str similarity, str reduction, bool divide, bool need_emb, bool need_ref) "
        "-> (Tensor grad_emb, Tensor grad_ref)",
        &dml::pair_loss_backward_op<dml::cuda::pair_loss_backward>);
}
