// The op schemas, and the pybind11 module that loads them and tells what was built.
//
// All ops are functional. What one forward pass must hand to its backward pass travels in one tensor of
// bytes, whose layout is the private matter of each device's kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "cpu/kernels/tile_kernels.h"
#include "cpu/pairs/formula_ops.h"
#include "cpu/pairs/ring.h"
#include "custom/registry.h"
#include "torch/fast_path.h"

#ifndef DML_CUDA_ARCHS
#define DML_CUDA_ARCHS ""
#endif
#ifndef DML_CUDA_VERSION
#define DML_CUDA_VERSION ""
#endif

// The loss of a batch, and its gradient. Beside embeddings [N, D] with their labels and ref_emb [M, D]:
//   self_index    int64 [N], the row of ref_emb that is the same point as row i, or -1. That pair does not
//   count
//               as a positive; mining sees it where mine_self_pair
//   num_valid_refs   int64, one number: only so many of the first rows of ref_emb take part. A tensor, so
//   that a
//               queue may fill up without a shape, a graph or a wait for the device
//   formula         a name of losses/list.h, with its params
//   similarity  cosine | dot | euclidean | euclidean_raw (of rows as they come)
//   reduction   mean | mean_nonzero | mean_valid | sum | none
//   divide      false: the loss is [part 0, part 1, count 0, count 1], for the caller to divide
TORCH_LIBRARY(dml_cuda, m) {
    m.def(
        "pair_loss(Tensor embeddings, Tensor labels, Tensor? ref_emb, Tensor? ref_labels, Tensor? "
        "self_index, "
        "Tensor? num_valid_refs, str formula, float[] params, float? epsilon, str similarity, str reduction, "
        "bool mine_self_pair, bool divide, bool save_for_backward) -> (Tensor loss, Tensor saved)");
    m.def(
        "pair_loss_backward(Tensor grad_loss, Tensor embeddings, Tensor labels, Tensor? ref_emb, "
        "Tensor? ref_labels, Tensor? self_index, Tensor? num_valid_refs, Tensor saved, str formula, float[] "
        "params, "
        "str similarity, str reduction, bool divide, bool need_emb, bool need_ref) "
        "-> (Tensor grad_emb, Tensor grad_ref)");

    // The same a block of columns at a time, for who never holds all of them (cpu/blocks.cpp,
    // cuda_blocks.cpp): rows [N] against blocks [B, D], of which self_index [N] names each row's own column,
    // or -1. Mining does not see that pair. States and weights are the private matter of each device's
    // kernels; found, what the stages so far have found in a block (which of it may have a gradient), too.
    m.def(
        "pair_block_turn(Tensor? state, Tensor pairs, str formula, float[] params, float? epsilon, str "
        "stage, "
        "bool wide) -> Tensor state");
    m.def(
        "pair_block(Tensor state, Tensor embeddings, Tensor labels, Tensor block, Tensor block_labels, "
        "Tensor? self_index, str formula, float[] params, float? epsilon, str similarity, str reduction, str "
        "stage, Tensor? found=None) "
        "-> (Tensor state, Tensor found)");
    m.def(
        "pair_block_rows(Tensor state, Tensor pairs, str formula, float[] params, bool mining, str "
        "reduction) "
        "-> (Tensor losses, Tensor weights)");
    m.def(
        "pair_block_backward(Tensor grad_parts, Tensor weights, Tensor kept, Tensor embeddings, "
        "Tensor labels, Tensor block, Tensor block_labels, Tensor? self_index, str formula, float[] params, "
        "str similarity, bool need_emb, bool need_block) -> (Tensor grad_emb, Tensor grad_block)");

    // Pairs given as lists. rows ascends, and the pairs of row i are [row_offsets[i], row_offsets[i + 1]).
    // products: <x[rows[k]], y[cols[k]]> [P]. sums: the weighted points of each row [R, D].
    m.def("pair_products(Tensor x, Tensor y, Tensor rows, Tensor cols, Tensor row_offsets) -> Tensor");
    m.def("pair_sums(Tensor weights, Tensor points, Tensor index, Tensor offsets) -> Tensor");
    // log(sum exp) of each segment of logits, or log(1 + sum exp): -inf, or 0, where there is none.
    m.def("segment_logsumexp(Tensor logits, Tensor offsets, bool plus_one) -> Tensor");
    // Its gradient: grad[r] * exp(logits - value[r]) for the logits of segment r.
    m.def("segment_softmax(Tensor grad, Tensor logits, Tensor value, Tensor offsets) -> Tensor");
    // Pairs in the order of their rows, then columns; fresh is false for the repetition of a pair.
    m.def(
        "pair_sort(Tensor rows, Tensor cols, SymInt n, SymInt m) -> "
        "(Tensor rows, Tensor cols, Tensor offsets, Tensor fresh)");
    // The stable order by column, and where each column's pairs begin.
    m.def("column_order(Tensor cols, SymInt m) -> (Tensor order, Tensor offsets)");

    // Triplets of an anchor with a positive and a negative, without listing them; points as in pair_loss.
    //   beta       [N], of the term margin
    //   seed       int64 [1], of a draw
    //   term       hinge | softplus | margin
    //   positives  all | hardest | easiest
    //   negatives  all | hardest | easiest | semihard | drawn
    //   params     margin, gap_low, gap_high, pos_low, pos_high, neg_low, neg_high, cutoff, nonzero_cutoff,
    //   dim
    //              (triplets.h)
    //   sums       [N] a row's terms, summed; counts [N, 2] its terms that are not 0, its triplets
    //   grad_*     the gradient of sums.sum(), in the type of sums; [0] where not saved or absent
    m.def(
        "triplet_loss(Tensor embeddings, Tensor labels, Tensor? ref_emb, Tensor? ref_labels, "
        "Tensor? self_index, Tensor? num_valid_refs, Tensor? beta, Tensor? seed, str term, str positives, "
        "str negatives, float[] params, str similarity, bool save, bool save_ref=True) -> "
        "(Tensor sums, Tensor counts, Tensor grad_emb, Tensor grad_ref, Tensor grad_beta)");
    // The same of triplets given as lists, long beside the pairs that there are, in any order; there [T]
    // tells which count (none: all). On CPUs.
    m.def(
        "triplet_list_loss(Tensor embeddings, Tensor? ref_emb, Tensor anchors, Tensor positives, "
        "Tensor negatives, Tensor? there, Tensor? beta, str term, float margin, str similarity, bool save, "
        "bool save_ref=True) -> "
        "(Tensor sums, Tensor counts, Tensor grad_emb, Tensor grad_ref, Tensor grad_beta)");
    // The column, and its similarity, that a rule finds for each row, or for each pair of anchors (ascending)
    // and positives (-1: none): hardest_ or easiest_positive, hardest_, easiest_, semihard_ or
    // drawn_negative. -1 and -inf where there is none.
    m.def(
        "select(Tensor embeddings, Tensor labels, Tensor? ref_emb, Tensor? ref_labels, Tensor? self_index, "
        "Tensor? num_valid_refs, Tensor? seed, str rule, float[] params, Tensor? anchors, Tensor? positives, "
        "str similarity) -> (Tensor column, Tensor similarity)");
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled kernels of dml_cuda; importing it registers torch.ops.dml_cuda.";
    m.attr("version") = DML_VERSION;
    m.attr("torch_version") = DML_TORCH_VERSION;
    m.attr("cuda_version") = DML_CUDA_VERSION;
    m.attr("cuda_archs") = DML_CUDA_ARCHS;
    pybind11::dict formulas;
    for (const dml::FormulaInfo& formula : dml::kFormulas)
        formulas[pybind11::str(formula.name.data(), formula.name.size())] = formula.params;
    m.attr("formulas") = formulas;  // name: number of parameters
    m.attr("compile_flags") = DML_COMPILE_FLAGS;
    m.def(
        "load_formula",
        [](const std::string& path, const std::string& name) { dml::load_formula(path, name); },
        "Takes a formula out of a library (custom_formula.h), under a name.", pybind11::arg("path"),
        pybind11::arg("name"));
    dml::def_fast_path(m);
    m.def("formula_facts", &dml::cpu::formula_facts, "What a formula declares.", pybind11::arg("name"));
    m.def("stages", &dml::cpu::stages,
          "The passes over all columns that a formula's forward makes, in order.", pybind11::arg("formula"),
          pybind11::arg("mining"));
    m.def("cpu_instruction_sets", &dml::cpu::available_instruction_sets,
          "Instruction sets of this machine that there are kernels for, slowest first.");
    m.def("cpu_instruction_set", &dml::cpu::instruction_set, "The instruction set in use.");
    m.def("set_cpu_instruction_set", &dml::cpu::set_instruction_set, "Choose one, to test or compare.",
          pybind11::arg("name"));
}
