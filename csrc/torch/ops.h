// What the implementations of pair_loss on every device share: the call as the op gets it, the checks that
// keep a direct call of an op from crashing (the public functions in Python check first, with friendlier
// messages), and its description without torch (problem.h).
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

namespace dml {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments of pair_loss and, as far as it has them, of pair_loss_backward.
struct Call {
    const at::Tensor& embeddings;          // [N, D]
    const at::Tensor& labels;              // [N]
    const OptionalTensor& ref_emb;         // [M, D]
    const OptionalTensor& ref_labels;      // [M]
    const OptionalTensor& self_index;      // [N]
    const OptionalTensor& num_valid_refs;  // one number
    std::string_view formula;
    at::ArrayRef<double> params;
    std::optional<double> epsilon;
    std::string_view similarity, reduction;
    bool mine_self_pair, divide, save_for_backward;
};

using ForwardResult = std::tuple<at::Tensor, at::Tensor>;   // loss, saved
using BackwardResult = std::tuple<at::Tensor, at::Tensor>;  // grad_emb, grad_ref

// The ops as functions of a Call: the one place that spells out their arguments. pair_loss_op<f> is what is
// registered for a device that implements f.
template <ForwardResult (*forward)(const Call&)>
ForwardResult pair_loss_op(const at::Tensor& embeddings, const at::Tensor& labels,
                           const OptionalTensor& ref_emb, const OptionalTensor& ref_labels,
                           const OptionalTensor& self_index, const OptionalTensor& num_valid_refs,
                           c10::string_view formula, at::ArrayRef<double> params,
                           std::optional<double> epsilon, c10::string_view similarity,
                           c10::string_view reduction, bool mine_self_pair, bool divide,
                           bool save_for_backward) {
    return forward({embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, formula, params,
                    epsilon, similarity, reduction, mine_self_pair, divide, save_for_backward});
}

template <typename Op>
ForwardResult call_op(const Op& op, const Call& c) {
    return op.call(c.embeddings, c.labels, c.ref_emb, c.ref_labels, c.self_index, c.num_valid_refs, c.formula,
                   c.params, c.epsilon, c.similarity, c.reduction, c.mine_self_pair, c.divide,
                   c.save_for_backward);
}

// What backward has beyond the call.
struct Backward {
    const at::Tensor& grad_loss;
    const at::Tensor& saved;
    bool need_emb, need_ref;
};

template <BackwardResult (*backward)(const Call&, const Backward&)>
BackwardResult pair_loss_backward_op(const at::Tensor& grad_loss, const at::Tensor& embeddings,
                                     const at::Tensor& labels, const OptionalTensor& ref_emb,
                                     const OptionalTensor& ref_labels, const OptionalTensor& self_index,
                                     const OptionalTensor& num_valid_refs, const at::Tensor& saved,
                                     c10::string_view formula, at::ArrayRef<double> params,
                                     c10::string_view similarity, c10::string_view reduction, bool divide,
                                     bool need_emb, bool need_ref) {
    return backward({embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, formula, params,
                     std::nullopt, similarity, reduction, true, divide, true},
                    {grad_loss, saved, need_emb, need_ref});
}

template <typename Op>
BackwardResult call_op(const Op& op, const Call& c, const Backward& b) {
    return op.call(b.grad_loss, c.embeddings, c.labels, c.ref_emb, c.ref_labels, c.self_index,
                   c.num_valid_refs, b.saved, c.formula, c.params, c.similarity, c.reduction, c.divide,
                   b.need_emb, b.need_ref);
}

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

inline void check_inputs(const Call& c) {
    check_points(c.embeddings, c.labels, "embeddings");
    TORCH_CHECK_VALUE(c.ref_emb.has_value() == c.ref_labels.has_value(),
                      "ref_emb and ref_labels go together");
    TORCH_CHECK_VALUE(c.ref_emb || !c.self_index, "self_index: expected ref_emb with it");
    TORCH_CHECK_VALUE(c.ref_emb || !c.num_valid_refs, "num_valid_refs: expected ref_emb with it");
    TORCH_CHECK_VALUE(c.divide || c.reduction != "none", "divide: expected a reduction to leave undivided");
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

// What backward gets from forward and from above it: `saved` must have the bytes that forward made.
inline void check_backward(const Call& c, const Backward& b, int64_t saved_bytes) {
    TORCH_CHECK_VALUE(b.saved.dim() == 1 && b.saved.scalar_type() == at::kByte && b.saved.is_contiguous() &&
                          b.saved.numel() == saved_bytes && b.saved.device() == c.embeddings.device(),
                      "saved: expected the ", saved_bytes, " bytes that forward saved, got ",
                      b.saved.scalar_type(), " of shape ", b.saved.sizes(), " on ", b.saved.device());
    const int64_t losses = c.reduction == "none" ? c.embeddings.size(0) : c.divide ? 1 : 4;
    TORCH_CHECK_VALUE(b.grad_loss.numel() == losses, "grad_loss: expected ", losses, " elements, got shape ",
                      b.grad_loss.sizes());
    TORCH_CHECK_VALUE(b.grad_loss.device() == c.embeddings.device(), "grad_loss: expected on ",
                      c.embeddings.device(), ", got on ", b.grad_loss.device());
}

// ---- the description --------------------------------------------------------------------------------------

// All but the pointers, which are each device's to lay out.
inline Problem describe(const Call& c) {
    Problem p;
    p.square = !c.ref_emb;
    p.queries.count = c.embeddings.size(0);
    p.refs.count = p.square ? p.queries.count : c.ref_emb->size(0);
    p.mine_self_pair = c.mine_self_pair;
    p.dim = c.embeddings.size(1);
    p.scalar = parse_scalar(c.embeddings.scalar_type());
    p.formula = find_formula(c.formula, c.params).id;
    std::copy(c.params.begin(), c.params.end(), p.params);
    p.similarity = parse_similarity(c.similarity);
    p.mining = {c.epsilon.has_value(), c.epsilon.value_or(0.0)};
    p.reduction = parse_reduction(c.reduction);
    p.divide = c.divide;
    return p;
}

}  // namespace dml
