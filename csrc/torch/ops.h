// What the implementations of pair_loss share on every device: the checks that keep a direct call of an op
// from crashing (the public functions in Python check first, with friendlier messages), and the description
// of a call without torch (problem.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "core/problem.h"
#include "custom/registry.h"
#include "torch/arguments.h"

namespace dml {

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;               // loss, saved
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // grad_emb, grad_ref, grad_params

// ---- names ------------------------------------------------------------------------------------------------

inline const FormulaInfo& find_formula(std::string_view name, at::ArrayRef<double> params) {
    if (const FormulaInfo* formula = formula_named(name)) {
        TORCH_CHECK_VALUE(static_cast<int>(params.size()) == formula->params, "params: expected ",
                          formula->params, " numbers for ", formula->name, ", got ", params.size());
        return *formula;
    }
    std::string known;
    for (const FormulaInfo& formula : kFormulas)
        known += (known.empty() ? "" : ", ") + std::string(formula.name);
    TORCH_CHECK_VALUE(false, "formula: expected one of ", known, "; got \"", name, "\"");
}

inline Reduction parse_reduction(std::string_view name) {
    if (name == "mean") return Reduction::kMean;
    if (name == "mean_nonzero") return Reduction::kMeanNonzero;
    if (name == "mean_valid") return Reduction::kMeanValid;
    if (name == "sum") return Reduction::kSum;
    TORCH_CHECK_VALUE(name == "none", "reduction: unknown \"", name, "\"");
    return Reduction::kNone;
}

inline bool is_tf32(std::string_view precision) {
    if (precision == "tf32") return true;
    TORCH_CHECK_VALUE(precision == "ieee", "precision: expected ieee or tf32, got \"", precision, "\"");
    return false;
}

inline Similarity parse_similarity(std::string_view name) {
    if (name == "cosine") return {false, true};
    if (name == "dot") return {false, false};
    if (name == "euclidean") return {true, true};
    TORCH_CHECK_VALUE(name == "euclidean_raw", "similarity: unknown \"", name, "\"");
    return {true, false};
}

inline Scalar parse_scalar(at::ScalarType type) {
    switch (type) {
        case at::kHalf:
            return Scalar::kFloat16;
        case at::kBFloat16:
            return Scalar::kBFloat16;
        case at::kFloat:
            return Scalar::kFloat32;
        case at::kDouble:
            return Scalar::kFloat64;
        default:
            TORCH_CHECK_TYPE(false, "embeddings: expected float16, bfloat16, float32 or float64, got ", type);
    }
}

// ---- checks -----------------------------------------------------------------------------------------------

inline void check_points(const at::Tensor& points, const at::Tensor& labels, const char* name) {
    TORCH_CHECK_VALUE(points.dim() == 2, name, ": expected a 2-D tensor, got ", points.dim(), " dimensions");
    TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == points.size(0), name, ": ", points.size(0),
                      " rows need as many labels in one dimension, got ", labels.sizes());
    TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels: the op takes int64, got ",
                     labels.scalar_type());
    TORCH_CHECK_VALUE(labels.device() == points.device(), "labels: on ", labels.device(), ", but ", name,
                      " on ", points.device());
}

inline void check_batch(const PairBatch& c) {
    check_points(c.embeddings, c.labels, "embeddings");
    TORCH_CHECK_VALUE(c.ref_emb.has_value() == c.ref_labels.has_value(),
                      "ref_emb and ref_labels go together");
    TORCH_CHECK_VALUE(c.ref_emb || !c.self_index, "self_index: expected ref_emb with it");
    TORCH_CHECK_VALUE(c.ref_emb || !c.num_valid_refs, "num_valid_refs: expected ref_emb with it");
    if (!c.ref_emb) return;
    const at::Tensor& refs = *c.ref_emb;
    check_points(refs, *c.ref_labels, "ref_emb");
    TORCH_CHECK_VALUE(refs.size(1) == c.embeddings.size(1), "ref_emb: expected ", c.embeddings.size(1),
                      " columns, got ", refs.size(1));
    TORCH_CHECK_TYPE(refs.scalar_type() == c.embeddings.scalar_type(), "ref_emb: expected ",
                     c.embeddings.scalar_type(), ", got ", refs.scalar_type());
    TORCH_CHECK_VALUE(refs.device() == c.embeddings.device(), "ref_emb: on ", refs.device(),
                      ", but embeddings on ", c.embeddings.device());
    const auto check_index = [&](const OptionalTensor& index, int64_t numel, const char* name) {
        if (!index) return;
        TORCH_CHECK_VALUE(index->numel() == numel, name, ": expected ", numel, " numbers, got shape ",
                          index->sizes());
        TORCH_CHECK_TYPE(index->scalar_type() == at::kLong, name, ": the op takes int64, got ",
                         index->scalar_type());
        TORCH_CHECK_VALUE(index->device() == c.embeddings.device(), name, ": on ", index->device(),
                          ", but embeddings on ", c.embeddings.device());
    };
    check_index(c.self_index, c.embeddings.size(0), "self_index");
    check_index(c.num_valid_refs, 1, "num_valid_refs");
}

// How many rows have a loss.
inline int64_t loss_rows(const Call& c) {
    return c.embeddings.size(0) + (c.both_directions ? c.ref_emb->size(0) : 0);
}

inline void check_row_weights(const OptionalTensor& weights, int64_t rows, const at::Tensor& embeddings) {
    if (!weights) return;
    TORCH_CHECK_VALUE(weights->dim() == 1 && weights->size(0) == rows, "row_weights: expected ", rows,
                      " numbers, got shape ", weights->sizes());
    TORCH_CHECK_TYPE(weights->is_floating_point(), "row_weights: expected floating-point numbers, got ",
                     weights->scalar_type());
    TORCH_CHECK_VALUE(weights->device() == embeddings.device(), "row_weights: on ", weights->device(),
                      ", but embeddings on ", embeddings.device());
}

inline void check_inputs(const Call& c) {
    check_batch(c);
    TORCH_CHECK_VALUE(!c.return_sums || c.reduction != "none",
                      "return_sums: expected a reduction other than none");
    TORCH_CHECK_VALUE(!c.both_directions || (c.ref_emb && !c.self_index && !c.num_valid_refs),
                      "both_directions: expected ref_emb, and neither self_index nor num_valid_refs");
    check_row_weights(c.row_weights, loss_rows(c), c.embeddings);
}

// The elements of the result.
inline int64_t loss_numel(const Call& c) {
    return c.reduction == "none" ? loss_rows(c) : c.return_sums ? 4 : 1;
}

// `saved` must have the bytes that forward made.
inline void check_backward(const Call& c, const at::Tensor& grad_loss, const at::Tensor& saved,
                           int64_t saved_bytes) {
    TORCH_CHECK_VALUE(saved.dim() == 1 && saved.scalar_type() == at::kByte && saved.is_contiguous() &&
                          saved.numel() == saved_bytes && saved.device() == c.embeddings.device(),
                      "saved: expected the ", saved_bytes, " bytes that forward saved, got ",
                      saved.scalar_type(), " of shape ", saved.sizes(), " on ", saved.device());
    TORCH_CHECK_VALUE(grad_loss.numel() == loss_numel(c), "grad_loss: expected ", loss_numel(c),
                      " elements, got shape ", grad_loss.sizes());
    TORCH_CHECK_VALUE(grad_loss.device() == c.embeddings.device(), "grad_loss: expected on ",
                      c.embeddings.device(), ", got on ", grad_loss.device());
}

// ---- the description --------------------------------------------------------------------------------------

// What the options say of a problem; points, sizes and type are left open, and so are parameters that are on
// the GPU of the points.
inline Problem describe(const PairOptions& o, c10::Device device = at::kCPU) {
    Problem p;
    at::ArrayRef<double> params = o.params;
    std::optional<double> epsilon = o.epsilon;
    at::Tensor values;
    double unknown[kMaxParams] = {};
    if (o.dynamic_params) {
        values = o.dynamic_params->contiguous();
        TORCH_CHECK_VALUE(values.dim() == 1 && values.numel() > 0 && values.numel() <= kMaxParams + 1 &&
                              values.scalar_type() == at::kDouble &&
                              (values.is_cpu() || values.device() == device),
                          "dynamic_params: expected params and epsilon in float64 on the CPU",
                          device.is_cpu() ? "" : " or the GPU of the embeddings", ", got ",
                          values.scalar_type(), " of shape ", values.sizes(), " on ", values.device());
        const auto* data = values.is_cpu() ? values.const_data_ptr<double>() : unknown;
        params = {data, static_cast<size_t>(values.numel() - 1)};
        if (epsilon && values.is_cpu()) epsilon = data[params.size()];
    }
    p.formula = find_formula(o.formula, params).id;
    std::copy(params.begin(), params.end(), p.params);
    p.similarity = parse_similarity(o.similarity);
    p.mining = {epsilon.has_value(), epsilon.value_or(0.0)};
    p.reduction = parse_reduction(o.reduction);
    p.mine_self_pair = o.mine_self_pair;
    p.return_sums = o.return_sums;
    p.both_directions = o.both_directions;
    return p;
}

// The sizes of a batch. The pointers are each device's to lay out.
inline void describe_batch(const PairBatch& c, Problem& p) {
    p.square = !c.ref_emb;
    p.queries.count = c.embeddings.size(0);
    p.refs.count = p.square ? p.queries.count : c.ref_emb->size(0);
    p.dim = c.embeddings.size(1);
    p.scalar = parse_scalar(c.embeddings.scalar_type());
}
inline Problem describe(const Call& c) {
    Problem p = describe(static_cast<const PairOptions&>(c), c.embeddings.device());
    describe_batch(c, p);
    return p;
}

}  // namespace dml
