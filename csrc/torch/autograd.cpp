// The derivative of pair_loss. In C++, because a small batch is all overhead: registered from Python the
// same costs 80 us more a step, as much as the kernels of 128 rows.
#include "torch/autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace dml {

ForwardResult dispatch_pair_loss(const Call& call) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dml_cuda::pair_loss", "")
                               .typed<decltype(pair_loss_op<dispatch_pair_loss>)>();
    return call_op(op, call);
}

bool needs_gradient(const at::Tensor& embeddings, const OptionalTensor& ref_emb) {
    return at::GradMode::is_enabled() &&
           (embeddings.requires_grad() || (ref_emb && ref_emb->requires_grad()));
}

bool has_tangent(const at::Tensor& x) { return x._fw_grad(/*level=*/0).defined(); }

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

ForwardResult forward_below(const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return dispatch_pair_loss(call);
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

// A node as those of torch's own functions, without the maps and lists that torch::autograd::Function keeps.
struct PairLossNode final : torch::autograd::Node {
    // `saved`, the op's second result, is no output of the node, as it has no gradient.
    SavedVariable embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, saved;
    std::string formula, similarity, reduction;
    std::vector<double> params;
    bool divide = true;

    std::string name() const override { return "PairLossBackward"; }

    void keep(const Call& call, const Tensor& bytes) {
        embeddings = SavedVariable(call.embeddings, false);
        labels = SavedVariable(call.labels, false);
        ref_emb = SavedVariable(call.ref_emb, false);
        ref_labels = SavedVariable(call.ref_labels, false);
        self_index = SavedVariable(call.self_index, false);
        num_valid_refs = SavedVariable(call.num_valid_refs, false);
        saved = SavedVariable(bytes, false);
        formula = call.formula;
        similarity = call.similarity;
        reduction = call.reduction;
        params = call.params.vec();
        divide = call.divide;
    }

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);  // of threads that go backward through one graph
        variable_list result(2);
        if (!grads[0].defined()) return result;
        const auto optional = [](const SavedVariable& x) {
            const Tensor tensor = x.unpack();
            return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
        };
        const Tensor x = embeddings.unpack(), y = labels.unpack(), bytes = saved.unpack();
        const OptionalTensor refs = optional(ref_emb), of_refs = optional(ref_labels),
                             self = optional(self_index), count = optional(num_valid_refs);
        const Call call = {x,          y,         refs, of_refs, self, count, formula, params, std::nullopt,
                           similarity, reduction, true, divide,  true};
        const bool need_emb = task_should_compute_output(0), need_ref = task_should_compute_output(1);
        const auto [grad_emb, grad_ref] = pair_loss_backward(call, {grads[0], bytes, need_emb, need_ref});
        if (need_emb) result[0] = grad_emb;
        if (need_ref) result[1] = grad_ref;
        return result;
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (SavedVariable* x :
             {&embeddings, &labels, &ref_emb, &ref_labels, &self_index, &num_valid_refs, &saved})
            x->reset_data();
    }
};

// Torch's pointers to nodes are shared_ptr, and of its own kind in newer versions.
using NodePointer = decltype(torch::autograd::Edge::function);
template <typename Node, typename Pointer = NodePointer>
auto make_node() {
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
        return std::make_shared<Node>();
    } else {
        return c10::make_intrusive<Node>();
    }
}

ForwardResult pair_loss(const Call& call) {
    const bool with_refs = call.ref_emb.has_value();
    TORCH_CHECK_NOT_IMPLEMENTED(
        !has_tangent(call.embeddings) && !(with_refs && has_tangent(*call.ref_emb)),
        "the fused losses of dml_cuda have no forward-mode derivative: differentiate in reverse, or pass "
        "backend=\"reference\"");
    if (!needs_gradient(call.embeddings, call.ref_emb)) return forward_below(call);
    const auto node = make_node<PairLossNode>();
    node->set_next_edges(
        torch::autograd::collect_next_edges(call.embeddings, with_refs ? *call.ref_emb : Tensor()));
    const auto [loss, saved] = forward_below(call);
    node->keep(call, saved);
    torch::autograd::set_history(loss, node);
    return {loss, saved};
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, Autograd, m) {
    m.impl("pair_loss", &pair_loss_op<pair_loss>);
    m.impl("pair_loss_backward", &pair_loss_backward_op<pair_loss_backward>);
}

}  // namespace dml
