// The results of a loss of triplets or of ranks, with gradients if wanted.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <tuple>

#include "cpu/triplets/gradient.h"

namespace dml::cpu::triplet {

// The rows' sums [N] and counts [N, 2], and the gradients of embeddings, references and parameters.
using RowLossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the loss of each row fills.
template <typename T>
struct RowResults {
    // params: each row's derivatives by parameters, zeros.
    RowResults(const Similarities<T>& similarities, const Tensor& params) : grad_params(params) {
        const auto options = similarities.rows.options();
        sums = at::zeros({similarities.n}, options);
        counts = at::zeros({similarities.n, 2}, options.dtype(at::kLong));
    }
    Tensor sums, counts, grad_params;
};

// Runs a loss. save, save_ref: whether gradients are wanted, of ref_emb too; capacity: rows of ref_emb.
template <typename T, typename Loss>
RowLossResult run_loss(const Similarities<T>& similarities, Loss& loss, bool save, bool save_ref,
                       int64_t capacity) {
    const auto options = similarities.rows.options();
    const auto none = [&] { return at::empty({0}, options); };  // one per output: outputs must not alias
    const bool for_refs = save && save_ref && !similarities.square;
    if (!similarities.finite()) {
        const auto poison = [&](at::IntArrayRef shape) {
            return at::full(shape, std::numeric_limits<double>::quiet_NaN(), options);
        };
        return {poison({similarities.n}), loss.counts,
                save ? poison({similarities.n, similarities.rows.dim}) : none(),
                for_refs ? poison({capacity, similarities.rows.dim}) : none(),
                at::full_like(loss.grad_params, std::numeric_limits<double>::quiet_NaN())};
    }
    if (!save) {
        loss.run(nullptr);
        return {loss.sums, loss.counts, none(), none(), none()};
    }
    RowBlockGradient<T> gradient(similarities, for_refs);
    loss.run(&gradient);
    return {loss.sums, loss.counts, gradient.of_rows(), for_refs ? gradient.of_cols(capacity) : none(),
            loss.grad_params};
}

}  // namespace dml::cpu::triplet
