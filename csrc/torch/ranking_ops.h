// What the implementations of ranking_loss share on every device: the names and the parameters.
#pragma once

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "core/ranking.h"
#include "torch/triplet_ops.h"

namespace dml {

inline Ranking parse_ranking(c10::string_view name) {
    if (name == "smooth_ap") return Ranking::kSmoothAP;
    if (name == "recall_at_k") return Ranking::kRecallAtK;
    TORCH_CHECK_VALUE(name == "fast_ap", "loss: expected smooth_ap, recall_at_k or fast_ap, got \"", name,
                      "\"");
    return Ranking::kFastAP;
}

struct RankingRule {
    Ranking loss;
    double temperature = 1, temperature_k = 1;
    std::vector<double> cutoffs;  // of Recall@K
    int64_t bins = 0;             // of FastAP

    // Whether its parameters are numbers that a loss can be computed with. Otherwise every loss is NaN.
    bool possible() const { return temperature > 0 && temperature_k > 0; }
};

inline RankingRule ranking_rule(c10::string_view name, at::ArrayRef<double> params,
                                const OptionalTensor& dynamic_params, c10::string_view similarity) {
    at::Tensor values;
    if (dynamic_params) {
        values = dynamic_params->contiguous();
        TORCH_CHECK_VALUE(values.dim() == 1 && values.scalar_type() == at::kDouble && values.is_cpu(),
                          "dynamic_params: expected params in float64 on the CPU, got ", values.scalar_type(),
                          " of shape ", values.sizes(), " on ", values.device());
        params = {values.const_data_ptr<double>(), static_cast<size_t>(values.numel())};
    }
    RankingRule rule;
    rule.loss = parse_ranking(name);
    const size_t least = rule.loss == Ranking::kRecallAtK ? 3 : 1;
    const size_t most = rule.loss == Ranking::kRecallAtK ? 2 + kMostCutoffs : 1;
    TORCH_CHECK_VALUE(params.size() >= least && params.size() <= most, "params: expected ", least, " to ",
                      most, " numbers for ", name, ", got ", params.size());
    if (rule.loss == Ranking::kFastAP) {
        TORCH_CHECK_VALUE(params[0] >= 1 && params[0] <= (1 << 20), "params: expected 1 to 2^20 bins, got ",
                          params[0]);
        TORCH_CHECK_VALUE(similarity == "cosine", "similarity: expected cosine with fast_ap, got \"",
                          similarity, "\"");
        rule.bins = static_cast<int64_t>(params[0]);
        return rule;
    }
    rule.temperature = params[0];
    if (rule.loss == Ranking::kRecallAtK) {
        rule.temperature_k = params[1];
        rule.cutoffs.assign(params.begin() + 2, params.end());
    }
    return rule;
}

// The derivatives by temperature and temperature_k [2] as those by all params.
inline at::Tensor as_params(const at::Tensor& by_temperatures, const RankingRule& rule) {
    switch (rule.loss) {
        case Ranking::kSmoothAP:
            return by_temperatures.narrow(0, 0, 1).clone();
        case Ranking::kRecallAtK:
            return at::constant_pad_nd(by_temperatures, {0, static_cast<int64_t>(rule.cutoffs.size())});
        default:
            return at::zeros({1}, by_temperatures.options());
    }
}

}  // namespace dml
