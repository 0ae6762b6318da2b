// csrc/cuda_triplets.cpp for CPU tensors, with the kernels of the emulator: its ops as dml_cuda_on_host.
#include <torch/library.h>

// The file's own registration, for CUDA tensors, becomes a function that nobody calls.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) [[maybe_unused]] static void not_registered(torch::Library& m)
#include "torch/cuda_triplets.cpp"

TORCH_LIBRARY(dml_cuda_on_host, m) {
    m.def(
        "triplet_loss(Tensor embeddings, Tensor labels, Tensor? ref_emb, Tensor? ref_labels, "
        "Tensor? self_index, Tensor? num_valid_refs, Tensor? beta, Tensor? seed, str term, str positives, "
        "str negatives, float[] params, str similarity, bool save, bool save_ref=True) -> "
        "(Tensor sums, Tensor counts, Tensor grad_emb, Tensor grad_ref, Tensor grad_beta)",
        &dml::cuda::triplet_loss);
    m.def(
        "select(Tensor embeddings, Tensor labels, Tensor? ref_emb, Tensor? ref_labels, Tensor? self_index, "
        "Tensor? num_valid_refs, Tensor? seed, str rule, float[] params, Tensor? anchors, Tensor? positives, "
        "str similarity) -> (Tensor column, Tensor similarity)",
        &dml::cuda::select);
}
