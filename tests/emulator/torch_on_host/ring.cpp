// csrc/cuda_blocks.cpp for CPU tensors, with the kernels of the emulator: its ops as dml_cuda_blocks_on_host.
#include <torch/library.h>

// The file's own registration, for CUDA tensors, becomes a function that nobody calls.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "no_custom_formulas.h"
#include "torch/cuda_ring.cpp"

TORCH_LIBRARY(dml_cuda_blocks_on_host, m) {
    m.def(
        "pair_block_turn(Tensor? state, Tensor pairs, str formula, float[] params, float? epsilon, str "
        "stage, "
        "bool wide) -> Tensor state",
        &dml::cuda::turn);
    m.def(
        "pair_block(Tensor state, Tensor embeddings, Tensor labels, Tensor block, Tensor block_labels, "
        "Tensor? self_index, str formula, float[] params, float? epsilon, str similarity, str reduction, str "
        "stage, Tensor? found=None) "
        "-> (Tensor state, Tensor found)",
        &dml::cuda::add);
    m.def(
        "pair_block_rows(Tensor state, Tensor pairs, str formula, float[] params, bool mining, str "
        "reduction) "
        "-> (Tensor losses, Tensor weights)",
        &dml::cuda::finish);
    m.def(
        "pair_block_backward(Tensor grad_parts, Tensor weights, Tensor kept, Tensor embeddings, "
        "Tensor labels, Tensor block, Tensor block_labels, Tensor? self_index, str formula, float[] params, "
        "str similarity, bool need_emb, bool need_block) -> (Tensor grad_emb, Tensor grad_block)",
        &dml::cuda::block_backward_op);
}
