// What the implementations of the ops on every device share: the checks that keep a direct call of
// an op from crashing (the public functions in Python check first, with friendlier messages), and
// the meaning of their string arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "pair_math.h"

namespace dml {

enum class Reduction { kMean, kMeanNonzero, kMeanValid, kSum, kNone };

inline PairLoss parse_loss(std::string_view name, c10::ArrayRef<double> params) {
    TORCH_CHECK_VALUE(name == "multi_similarity" || name == "circle",
                      "loss: expected \"multi_similarity\" or \"circle\", got \"", name, "\"");
    TORCH_CHECK_VALUE(params.size() == 3, "params: expected 3 numbers, got ", params.size());
    return name == "circle" ? PairLoss::kCircle : PairLoss::kMultiSimilarity;
}

inline Reduction parse_reduction(std::string_view name) {
    if (name == "mean") return Reduction::kMean;
    if (name == "mean_nonzero") return Reduction::kMeanNonzero;
    if (name == "mean_valid") return Reduction::kMeanValid;
    if (name == "sum") return Reduction::kSum;
    TORCH_CHECK_VALUE(name == "none", "reduction: unknown \"", name, "\"");
    return Reduction::kNone;
}

inline void check_points(const at::Tensor& points, const at::Tensor& labels, const char* name) {
    TORCH_CHECK_VALUE(points.dim() == 2, name, ": expected a 2-D tensor, got ", points.dim(), " dimensions");
    TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == points.size(0), name, ": ", points.size(0),
                      " rows need as many labels in one dimension, got ", labels.sizes());
    TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels: the op takes int64, got ",
                     labels.scalar_type());
    TORCH_CHECK_VALUE(labels.device() == points.device(), "labels: on ", labels.device(), ", but ", name,
                      " on ", points.device());
}

inline void check_inputs(const at::Tensor& embeddings, const at::Tensor& labels,
                         const std::optional<at::Tensor>& ref_emb,
                         const std::optional<at::Tensor>& ref_labels,
                         const std::optional<at::Tensor>& self_ref,
                         const std::optional<at::Tensor>& ref_count) {
    check_points(embeddings, labels, "embeddings");
    TORCH_CHECK_VALUE(ref_emb.has_value() == ref_labels.has_value(), "ref_emb and ref_labels go together");
    TORCH_CHECK_VALUE(ref_emb || !self_ref, "self_ref: expected ref_emb with it");
    TORCH_CHECK_VALUE(ref_emb || !ref_count, "ref_count: expected ref_emb with it");
    if (!ref_emb) return;
    check_points(*ref_emb, *ref_labels, "ref_emb");
    TORCH_CHECK_VALUE(ref_emb->size(1) == embeddings.size(1), "ref_emb: expected ", embeddings.size(1),
                      " columns, got ", ref_emb->size(1));
    TORCH_CHECK_TYPE(ref_emb->scalar_type() == embeddings.scalar_type(), "ref_emb: expected ",
                     embeddings.scalar_type(), ", got ", ref_emb->scalar_type());
    TORCH_CHECK_VALUE(ref_emb->device() == embeddings.device(), "ref_emb: on ", ref_emb->device(),
                      ", but embeddings on ", embeddings.device());
    const auto check_index = [&](const std::optional<at::Tensor>& index, int64_t numel, const char* name) {
        if (!index) return;
        TORCH_CHECK_VALUE(index->numel() == numel, name, ": expected ", numel, " numbers, got shape ",
                          index->sizes());
        TORCH_CHECK_TYPE(index->scalar_type() == at::kLong, name, ": the op takes int64, got ",
                         index->scalar_type());
        TORCH_CHECK_VALUE(index->device() == embeddings.device(), name, ": on ", index->device(),
                          ", but embeddings on ", embeddings.device());
    };
    check_index(self_ref, embeddings.size(0), "self_ref");
    check_index(ref_count, 1, "ref_count");
}

}  // namespace dml
