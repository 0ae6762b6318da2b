// The derivative of pair_loss, for eager mode, torch.compile and torch.func alike. In C++, because a small
// batch is all overhead: registered from Python it costs 80 us more a step, as much as the kernels of 128
// rows.
#include "torch/autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>

namespace dml {

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

template <typename Flat>
auto find_op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<decltype(Flat::call)>();
}

}  // namespace

ForwardResult dispatch_pair_loss(const Call& call) {
    static const auto op = find_op<FlatOp<&dispatch_pair_loss>>("dml_cuda::pair_loss");
    return call_op(op, call);
}

bool needs_gradient(const Call& call) {
    const auto wants = [](const OptionalTensor& x) { return x && x->requires_grad(); };
    return at::GradMode::is_enabled() &&
           (call.embeddings.requires_grad() || wants(call.ref_emb) || wants(call.dynamic_params));
}

bool has_tangent(const at::Tensor& x) { return x._fw_grad(/*level=*/0).defined(); }

namespace {

ForwardResult forward_below(const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return dispatch_pair_loss(call);
}

BackwardResult dispatch_backward(const Call& call, const Tensor& grad_loss, const Tensor& saved,
                                 bool need_emb, bool need_ref, bool need_params) {
    static const auto op = find_op<FlatOp<&dispatch_backward>>("dml_cuda::pair_loss_backward");
    return call_op(op, call, grad_loss, saved, need_emb, need_ref, need_params);
}

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

// The node of the gradient: differentiating it is an error that says why.
struct SecondDerivativeNode final : torch::autograd::Node {
    std::string name() const override { return "PairLossSecondDerivative"; }
    variable_list apply(variable_list&&) override {
        TORCH_CHECK(false,
                    "the fused losses of dml_cuda have no second derivative: pass backend=\"reference\" to "
                    "differentiate their gradient");
    }
};

BackwardResult pair_loss_backward(const Call& call, const Tensor& grad_loss, const Tensor& saved,
                                  bool need_emb, bool need_ref, bool need_params) {
    const Tensor refs = call.ref_emb.value_or(Tensor()), params = call.dynamic_params.value_or(Tensor());
    const bool has_graph = torch::autograd::compute_requires_grad(grad_loss, call.embeddings, refs, params);
    NodePointer node;
    if (has_graph) {
        node = make_node<SecondDerivativeNode>();
        node->set_next_edges(torch::autograd::collect_next_edges(grad_loss, call.embeddings, refs, params));
    }
    const BackwardResult grads = [&] {
        const at::AutoDispatchBelowADInplaceOrView below;
        return dispatch_backward(call, grad_loss, saved, need_emb, need_ref, need_params);
    }();
    if (has_graph) {
        torch::autograd::set_history(std::get<0>(grads), node);
        torch::autograd::set_history(std::get<1>(grads), node);
        torch::autograd::set_history(std::get<2>(grads), node);
    }
    return grads;
}

// A node as those of torch's own functions, without the maps and lists that torch::autograd::Function keeps,
// and which torch.func can differentiate through, as it cannot through that class.
struct PairLossNode final : torch::autograd::Node {
    std::string name() const override { return "PairLossBackward"; }

    // `saved`, the op's second result, is no output of the node, as it has no gradient.
    void keep(const Call& call, const Tensor& saved) {
        embeddings_ = SavedVariable(call.embeddings, false);
        labels_ = SavedVariable(call.labels, false);
        ref_emb_ = SavedVariable(call.ref_emb, false);
        ref_labels_ = SavedVariable(call.ref_labels, false);
        self_index_ = SavedVariable(call.self_index, false);
        num_valid_refs_ = SavedVariable(call.num_valid_refs, false);
        row_weights_ = SavedVariable(call.row_weights, false);
        dynamic_params_ = SavedVariable(call.dynamic_params, false);
        saved_ = SavedVariable(saved, false);
        options_.emplace(call);
    }

    variable_list apply(variable_list&& grads) override {
        const std::lock_guard<std::mutex> lock(mutex_);  // of threads that go backward through one graph
        variable_list result(3);
        if (!grads[0].defined()) return result;
        const auto optional = [](const SavedVariable& x) {
            const Tensor tensor = x.unpack();
            return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
        };
        const Tensor embeddings = embeddings_.unpack(), labels = labels_.unpack(), saved = saved_.unpack();
        const OptionalTensor ref_emb = optional(ref_emb_), ref_labels = optional(ref_labels_),
                             self_index = optional(self_index_), num_valid_refs = optional(num_valid_refs_),
                             row_weights = optional(row_weights_);
        const Call call = {{embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs, row_weights},
                           options_->with(optional(dynamic_params_))};
        const bool need_emb = task_should_compute_output(0), need_ref = task_should_compute_output(1),
                   need_params = task_should_compute_output(2);
        const auto [grad_emb, grad_ref, grad_params] =
            dispatch_backward(call, grads[0], saved, need_emb, need_ref, need_params);
        if (need_emb) result[0] = grad_emb;
        if (need_ref) result[1] = grad_ref;
        if (need_params) result[2] = grad_params;
        return result;
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (SavedVariable* x : {&embeddings_, &labels_, &ref_emb_, &ref_labels_, &self_index_,
                                 &num_valid_refs_, &row_weights_, &dynamic_params_, &saved_})
            x->reset_data();
    }

   private:
    SavedVariable embeddings_, labels_, ref_emb_, ref_labels_, self_index_, num_valid_refs_, row_weights_,
        dynamic_params_, saved_;
    std::optional<OwnedOptions> options_;
};

ForwardResult pair_loss(const Call& call) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !has_tangent(call.embeddings) && !(call.ref_emb && has_tangent(*call.ref_emb)) &&
            !(call.dynamic_params && has_tangent(*call.dynamic_params)),
        "the fused losses of dml_cuda have no forward-mode derivative: differentiate in reverse, or pass "
        "backend=\"reference\"");
    if (!needs_gradient(call)) return forward_below(call);
    const auto node = make_node<PairLossNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(call.embeddings, call.ref_emb.value_or(Tensor()),
                                                             call.dynamic_params.value_or(Tensor())));
    const auto [loss, saved] = forward_below(call);
    node->keep(call, saved);
    torch::autograd::set_history(loss, node);
    return {loss, saved};
}

void refuse_vmap(const c10::OperatorHandle&, torch::jit::Stack*) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "the fused losses of dml_cuda take one batch at a time, not torch.vmap: call them in a loop, or pass "
        "backend=\"reference\"");
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, Autograd, m) {
    m.impl("pair_loss", &FlatOp<&pair_loss>::call);
    m.impl("pair_loss_backward", &FlatOp<&pair_loss_backward>::call);
}

TORCH_LIBRARY_IMPL(dml_cuda, FuncTorchBatched, m) {
    for (const char* name : {"pair_loss", "pair_loss_backward"})
        m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
}

}  // namespace dml
