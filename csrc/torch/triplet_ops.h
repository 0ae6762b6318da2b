// What the implementations of triplet_loss and select share on every device: the points, the checks, the
// names.
#pragma once

#include <array>
#include <limits>

#include "core/triplets.h"
#include "torch/ops.h"

namespace dml {

// A batch and how its points are compared; the rest of the arguments is each op's own.
struct TripletPoints : PairBatch {
    c10::string_view similarity;
};

struct TripletChoice {
    Selection positives, negatives;
};

inline TripletTerm parse_term(c10::string_view name) {
    if (name == "hinge") return TripletTerm::kHinge;
    if (name == "softplus") return TripletTerm::kSoftplus;
    TORCH_CHECK_VALUE(name == "margin", "term: expected hinge, softplus or margin, got \"", name, "\"");
    return TripletTerm::kMargin;
}

inline TripletChoice parse_choice(c10::string_view positives, c10::string_view negatives) {
    const auto common = [](c10::string_view name) -> std::optional<Selection> {
        if (name == "all") return Selection::kAll;
        if (name == "hardest") return Selection::kHardest;
        if (name == "easiest") return Selection::kEasiest;
        return std::nullopt;
    };
    std::optional<Selection> of_positives = common(positives), of_negatives = common(negatives);
    TORCH_CHECK_VALUE(of_positives, "positives: expected all, hardest or easiest, got \"", positives, "\"");
    if (negatives == "semihard") of_negatives = Selection::kSemihard;
    if (negatives == "drawn") of_negatives = Selection::kDrawn;
    TORCH_CHECK_VALUE(of_negatives, "negatives: expected all, hardest, easiest, semihard or drawn, got \"",
                      negatives, "\"");
    return {*of_positives, *of_negatives};
}

// What `select` looks for.
struct SelectRule {
    bool positive;  // among the positives
    Selection which;
};

inline SelectRule parse_rule(c10::string_view name) {
    if (name == "hardest_positive") return {true, Selection::kHardest};
    if (name == "easiest_positive") return {true, Selection::kEasiest};
    if (name == "hardest_negative") return {false, Selection::kHardest};
    if (name == "easiest_negative") return {false, Selection::kEasiest};
    if (name == "semihard_negative") return {false, Selection::kSemihard};
    TORCH_CHECK_VALUE(name == "drawn_negative",
                      "rule: expected hardest_positive, easiest_positive, hardest_negative, "
                      "easiest_negative, semihard_negative or drawn_negative, got \"",
                      name, "\"");
    return {false, Selection::kDrawn};
}

inline std::array<double, kTripletParams> triplet_params(at::ArrayRef<double> params) {
    TORCH_CHECK_VALUE(params.size() == kTripletParams, "params: expected ", kTripletParams, " numbers, got ",
                      params.size());
    std::array<double, kTripletParams> numbers;
    std::copy(params.begin(), params.end(), numbers.begin());
    return numbers;
}

inline void check_triplet_points(const TripletPoints& points) {
    check_batch(points);
    parse_scalar(points.embeddings.scalar_type());
    parse_similarity(points.similarity);
}

inline void check_seed(const OptionalTensor& seed, bool needed, const at::Tensor& embeddings) {
    TORCH_CHECK_VALUE(seed || !needed, "seed: expected one number for a draw, got none");
    if (!seed) return;
    TORCH_CHECK_TYPE(seed->scalar_type() == at::kLong, "seed: expected int64, got ", seed->scalar_type());
    TORCH_CHECK_VALUE(seed->numel() == 1, "seed: expected one number, got shape ", seed->sizes());
    TORCH_CHECK_VALUE(seed->device() == embeddings.device(), "seed: on ", seed->device(),
                      ", but embeddings on ", embeddings.device());
}

inline void check_row_params(const OptionalTensor& of_rows, bool needed, const at::Tensor& embeddings) {
    TORCH_CHECK_VALUE(of_rows || !needed,
                      "row_params: expected a number for each row with term=\"margin\", got none");
    if (!of_rows) return;
    TORCH_CHECK_VALUE(of_rows->dim() == 1 && of_rows->size(0) == embeddings.size(0), "row_params: expected ",
                      embeddings.size(0), " numbers in one dimension, got shape ", of_rows->sizes());
    TORCH_CHECK_TYPE(of_rows->is_floating_point(), "row_params: expected floating point, got ",
                     of_rows->scalar_type());
    TORCH_CHECK_VALUE(of_rows->device() == embeddings.device(), "row_params: on ", of_rows->device(),
                      ", but embeddings on ", embeddings.device());
}

// Triplets given as lists, likewise.
inline void check_triplet_lists(const at::Tensor& embeddings, const OptionalTensor& ref_emb,
                                const at::Tensor& anchors, const at::Tensor& positives,
                                const at::Tensor& negatives, const OptionalTensor& there) {
    TORCH_CHECK_VALUE(embeddings.dim() == 2, "embeddings: expected a 2-D tensor, got ", embeddings.dim(),
                      " dimensions");
    parse_scalar(embeddings.scalar_type());
    if (ref_emb) {
        TORCH_CHECK_VALUE(ref_emb->dim() == 2 && ref_emb->size(1) == embeddings.size(1), "ref_emb: expected ",
                          embeddings.size(1), " columns, got shape ", ref_emb->sizes());
        TORCH_CHECK_TYPE(ref_emb->scalar_type() == embeddings.scalar_type(), "ref_emb: expected ",
                         embeddings.scalar_type(), ", got ", ref_emb->scalar_type());
        TORCH_CHECK_VALUE(ref_emb->device() == embeddings.device(), "ref_emb: on ", ref_emb->device(),
                          ", but embeddings on ", embeddings.device());
    }
    const auto check = [&](const at::Tensor& list, at::ScalarType type, const char* name) {
        TORCH_CHECK_VALUE(list.dim() == 1 && list.size(0) == anchors.size(0), name,
                          ": expected one for each triplet in one dimension, got shape ", list.sizes());
        TORCH_CHECK_TYPE(list.scalar_type() == type, name, ": expected ", type, ", got ", list.scalar_type());
        TORCH_CHECK_VALUE(list.device() == embeddings.device(), name, ": on ", list.device(),
                          ", but embeddings on ", embeddings.device());
    };
    check(anchors, at::kLong, "anchors");
    check(positives, at::kLong, "positives");
    check(negatives, at::kLong, "negatives");
    if (there) check(*there, at::kBool, "there");
}

// Shapes and types; that anchors ascend and positives exist is for the device to see.
inline void check_pairs(const OptionalTensor& anchors, const OptionalTensor& positives, SelectRule rule,
                        const at::Tensor& embeddings) {
    TORCH_CHECK_VALUE(anchors.has_value() == positives.has_value(), "anchors and positives go together");
    const bool per_pair = rule.which == Selection::kSemihard || rule.which == Selection::kDrawn;
    TORCH_CHECK_VALUE(anchors || !per_pair, "anchors: expected with this rule, which chooses for each pair");
    if (!anchors) return;
    for (const auto& [index, name] : {std::pair(&*anchors, "anchors"), {&*positives, "positives"}}) {
        TORCH_CHECK_VALUE(index->dim() == 1 && index->size(0) == anchors->size(0), name,
                          ": expected one index for each pair in one dimension, got shape ", index->sizes());
        TORCH_CHECK_TYPE(index->scalar_type() == at::kLong, name, ": expected int64, got ",
                         index->scalar_type());
        TORCH_CHECK_VALUE(index->device() == embeddings.device(), name, ": on ", index->device(),
                          ", but embeddings on ", embeddings.device());
    }
}

}  // namespace dml
