// The derivative of pair_loss. In C++, because a small batch is all overhead: registered from Python the
// same costs 80 us more a step, as much as the kernels of 128 rows.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

namespace dml {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

ForwardResult forward_below(const Call& call) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dml_cuda::pair_loss", "")
                               .typed<decltype(pair_loss_op<forward_below>)>();
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_op(op, call);
}

BackwardResult backward_below(const Call& call, const Backward& backward) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dml_cuda::pair_loss_backward", "")
                               .typed<decltype(pair_loss_backward_op<backward_below>)>();
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_op(op, call, backward);
}

// The gradient as a node of its own, so that differentiating it says why that does not work.
struct PairLossGradient : torch::autograd::Function<PairLossGradient> {
    static variable_list forward(AutogradContext*, const Tensor& /*grad_loss*/, const Tensor& /*embeddings*/,
                                 const OptionalTensor& /*ref_emb*/, const Call& call,
                                 const Backward& backward) {
        const auto [grad_emb, grad_ref] = backward_below(call, backward);
        return {grad_emb, grad_ref};
    }
    static variable_list backward(AutogradContext*, const variable_list&) {
        TORCH_CHECK(false,
                    "the fused losses of dml_cuda have no second derivative: pass backend=\"reference\" to "
                    "differentiate their gradient");
    }
};

BackwardResult pair_loss_backward(const Call& call, const Backward& backward) {
    // Without a graph of the gradient there is no second derivative to be refused.
    if (!at::GradMode::is_enabled()) return backward_below(call, backward);
    const variable_list found =
        PairLossGradient::apply(backward.grad_loss, call.embeddings, call.ref_emb, call, backward);
    return {found[0], found[1]};
}

// What backward needs beside tensors.
struct Options : torch::CustomClassHolder {
    std::string law, similarity, reduction;
    std::vector<double> params;
    bool divide, need_emb, need_ref;

    Options(const Call& call, bool need_emb, bool need_ref)
        : law(call.law),
          similarity(call.similarity),
          reduction(call.reduction),
          params(call.params.vec()),
          divide(call.divide),
          need_emb(need_emb),
          need_ref(need_ref) {}
};

struct PairLossNode : torch::autograd::Function<PairLossNode> {
    // The tensors that require a gradient stand first: apply looks for them among its arguments. `saved`, the
    // op's second result, is no output of the node, as it has no gradient.
    static variable_list forward(AutogradContext* ctx, const Tensor& embeddings,
                                 const OptionalTensor& ref_emb, const Call& call, Tensor* saved) {
        Tensor loss;
        std::tie(loss, *saved) = forward_below(call);
        const auto plain = [](const OptionalTensor& x) { return x ? *x : Tensor(); };
        ctx->save_for_backward({embeddings, call.labels, plain(ref_emb), plain(call.ref_labels),
                                plain(call.self_ref), plain(call.ref_count), *saved});
        ctx->saved_data["options"] = c10::IValue::make_capsule(c10::make_intrusive<Options>(
            call, embeddings.requires_grad(), ref_emb && ref_emb->requires_grad()));
        ctx->set_materialize_grads(false);
        return {loss};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list result(4);
        if (!grads[0].defined()) return result;
        const auto capsule = ctx->saved_data["options"].toCapsule();
        const auto& options = static_cast<const Options&>(*capsule);
        const variable_list saved = ctx->get_saved_variables();
        const auto optional = [&](int k) {
            return saved[k].defined() ? OptionalTensor(saved[k]) : std::nullopt;
        };
        const OptionalTensor ref_emb = optional(2), ref_labels = optional(3), self_ref = optional(4),
                             ref_count = optional(5);
        const Call call = {saved[0],          saved[1],    ref_emb,        ref_labels,   self_ref,
                           ref_count,         options.law, options.params, std::nullopt, options.similarity,
                           options.reduction, true,        options.divide, true};
        const auto [grad_emb, grad_ref] =
            pair_loss_backward(call, {grads[0], saved[6], options.need_emb, options.need_ref});
        if (options.need_emb) result[0] = grad_emb;
        if (options.need_ref) result[1] = grad_ref;
        return result;
    }
};

ForwardResult pair_loss(const Call& call) {
    const bool differentiable =
        at::GradMode::is_enabled() &&
        (call.embeddings.requires_grad() || (call.ref_emb && call.ref_emb->requires_grad()));
    if (!differentiable) return forward_below(call);
    Tensor saved;
    const variable_list out = PairLossNode::apply(call.embeddings, call.ref_emb, call, &saved);
    return {out[0], saved};
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, Autograd, m) {
    m.impl("pair_loss", &pair_loss_op<pair_loss>);
    m.impl("pair_loss_backward", &pair_loss_backward_op<pair_loss_backward>);
}

}  // namespace dml
