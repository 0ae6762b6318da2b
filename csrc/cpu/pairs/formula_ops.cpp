// Ops that evaluate a formula on gathered pairs: for listed pairs of a formula without a Python version, and
// for dml_cuda.check_loss.
#include "cpu/pairs/formula_ops.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "cpu/kernels/tile_kernels.h"
#include "torch/ops.h"

namespace dml::cpu {

FormulaFacts formula_facts(std::string_view name) {
    const FormulaInfo* formula = formula_named(name);
    TORCH_CHECK_VALUE(formula, "formula: unknown \"", name, "\"");
    const TileKernels<double>& of = tile_kernels<double>(formula->id);
    const CustomFormula* custom = custom_formula(formula->id);
    return {custom ? custom->parameters : "",
            {{"sums_negatives", of.neg == Accumulator::kSum},
             {"sums_positives", of.pos == Accumulator::kSum},
             {"plus_one", of.plus_one},
             {"context", of.context},
             {"pos_in_neg", of.pos_in_neg},
             {"only_negatives", of.only_negatives},
             {"hinge", of.hinge},
             {"log_one_plus", of.log_one_plus},
             {"needs_pos", of.needed.pos},
             {"needs_neg", of.needed.neg},
             {"counts_pairs", of.count == Count::kPairs},
             {"counts_rows_with_loss", of.count == Count::kRowsWithLoss},
             {"two_parts", of.parts == 2},
             {"cuda", formula->on_cuda && (custom == nullptr || custom->cuda != nullptr)}}};
}

namespace {

using at::Tensor;

// run(T()) for the scalar type of a tensor.
template <typename Run>
auto in_type_of(const Tensor& x, const char* name, const Run& run) {
    TORCH_CHECK_TYPE(x.scalar_type() == at::kDouble || x.scalar_type() == at::kFloat, name,
                     ": expected float32 or float64, got ", x.scalar_type());
    return x.scalar_type() == at::kDouble ? run(double()) : run(float());
}

std::vector<double> padded(at::ArrayRef<double> params) {
    std::vector<double> all(params.begin(), params.end());
    all.resize(kMaxParams);
    return all;
}

// s [P]; context [P], for positives of a formula with kContext. All results [P].
std::tuple<Tensor, Tensor, Tensor> formula_terms(const Tensor& s, const OptionalTensor& context,
                                                 c10::string_view name, at::ArrayRef<double> params,
                                                 bool positives) {
    const FormulaInfo& formula = find_formula(name, params);
    const Tensor points = s.contiguous(), beside = context ? context->contiguous() : at::zeros_like(points);
    TORCH_CHECK_VALUE(beside.sizes() == points.sizes() && beside.scalar_type() == points.scalar_type(),
                      "context: expected ", points.scalar_type(), " of shape ", points.sizes(), ", got ",
                      beside.scalar_type(), " ", beside.sizes());
    Tensor term = at::empty_like(points), derivative = at::empty_like(points),
           by_context = at::empty_like(points);
    in_type_of(points, "s", [&](auto number) {
        using T = decltype(number);
        tile_kernels<T>(formula.id)
            .terms(padded(params).data(), positives, points.numel(), points.const_data_ptr<T>(),
                   beside.const_data_ptr<T>(), term.data_ptr<T>(), derivative.data_ptr<T>(),
                   by_context.data_ptr<T>());
    });
    return {term, derivative, by_context};
}

// gathered [4, N]: neg, pos, neg_count and pos_count. Returns [6, N]: parts 0 and 1, counts 0 and 1, and the
// derivatives by neg (without the part through the context) and by pos.
Tensor formula_rows(const Tensor& gathered, c10::string_view name, at::ArrayRef<double> params) {
    const FormulaInfo& formula = find_formula(name, params);
    TORCH_CHECK_VALUE(gathered.dim() == 2 && gathered.size(0) == 4, "gathered: expected shape [4, N], got ",
                      gathered.sizes());
    const Tensor from = gathered.contiguous();
    const int64_t n = gathered.size(1);
    Tensor out = at::empty({6, n}, from.options());
    in_type_of(from, "gathered", [&](auto number) {
        using T = decltype(number);
        const TileKernels<T>& kernels = tile_kernels<T>(formula.id);
        const std::vector<double> values = padded(params);
        const T* g = from.const_data_ptr<T>();
        T* to = out.data_ptr<T>();
        for (int64_t i = 0; i < n; ++i) {
            const RowDerivatives<T> row =
                kernels.row(values.data(), {g[i], g[n + i], g[2 * n + i], g[3 * n + i]}, T(0));
            const T numbers[] = {row.part[0], row.part[1], row.count[0], row.count[1], row.d_neg, row.d_pos};
            for (int k = 0; k < 6; ++k) to[k * n + i] = numbers[k];
        }
    });
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dml_cuda, m) {
    m.def(
        "formula_terms(Tensor s, Tensor? context, str formula, float[] params, bool positives) "
        "-> (Tensor term, Tensor derivative, Tensor by_context)");
    m.def("formula_rows(Tensor gathered, str formula, float[] params) -> Tensor");
}

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("formula_terms", &formula_terms);
    m.impl("formula_rows", &formula_rows);
}

}  // namespace dml::cpu
