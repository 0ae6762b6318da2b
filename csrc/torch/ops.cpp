// Defines the ops, and the pybind11 module that loads them and reports what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "cpu/kernels/tile_kernels.h"
#include "cpu/pairs/formula_ops.h"
#include "cpu/pairs/ring.h"
#include "custom/registry.h"
#include "torch/fast_path.h"
#include "torch/precision.h"
#include "torch/schemas.h"
#include "torch/sizes.h"

#ifndef DML_CUDA_ARCHS
#define DML_CUDA_ARCHS ""
#endif
#ifndef DML_CUDA_VERSION
#define DML_CUDA_VERSION ""
#endif

TORCH_LIBRARY(dml_cuda, m) {
    namespace schemas = dml::schemas;
    for (const std::string& schema :
         {schemas::pair_loss(), schemas::pair_loss_backward(), schemas::pair_block_turn(),
          schemas::pair_block(), schemas::pair_block_rows(), schemas::pair_block_backward(),
          schemas::count_pairs(), schemas::triplet_loss(), schemas::ranking_loss(), schemas::select(),
          schemas::center_softmax(), schemas::center_softmax_backward()}) {
        m.def(schema.c_str());
    }

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

    // As triplet_loss, of triplets given as lists, as long as the pairs, in any order; `there` [T] marks
    // those that count (none: all). On CPUs.
    m.def(
        "triplet_list_loss(Tensor embeddings, Tensor? ref_emb, Tensor anchors, Tensor positives, "
        "Tensor negatives, Tensor? there, Tensor? row_params, str term, float margin, str similarity, bool "
        "save, "
        "bool save_ref=True) -> "
        "(Tensor sums, Tensor counts, Tensor grad_emb, Tensor grad_ref, Tensor grad_row_params)");
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
    dml::def_sizes(m);
    m.def("cuda_precision", &dml::cuda_precision,
          "How torch is set to multiply float32 on CUDA, as the ops name it.");
    m.def("cpu_instruction_sets", &dml::cpu::available_instruction_sets,
          "Instruction sets of this machine that there are kernels for, slowest first.");
    m.def("cpu_instruction_set", &dml::cpu::instruction_set, "The instruction set in use.");
    m.def("set_cpu_instruction_set", &dml::cpu::set_instruction_set, "Choose one, to test or compare.",
          pybind11::arg("name"));
}
