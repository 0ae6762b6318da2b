// The derivative of pair_loss, for eager mode, torch.compile and torch.func alike. In C++, because a small
// batch is all overhead: registered from Python it costs 80 us more a step, as much as the kernels of 128
// rows.
#include "torch/autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace dml {

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
namespace compiled = torch::dynamo::autograd;

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
    void compiled_args(compiled::CompiledNodeArgs&) const override {}
    variable_list apply_with_saved(const variable_list& grads, compiled::SwapSavedVariables&) override {
        return apply(variable_list(grads));
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

// What the node of a loss keeps, in this order.
enum Kept {
    kEmbeddings,
    kLabels,
    kRefEmb,
    kRefLabels,
    kSelfIndex,
    kNumValidRefs,
    kRowWeights,
    kDynamicParams,
    kSaved,
    kKept
};
using KeptTensors = std::array<OptionalTensor, kKept>;

variable_list gradients(const variable_list& grads, const KeptTensors& kept, const OwnedOptions& options,
                        bool need_emb, bool need_ref, bool need_params) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const Call call = {{*kept[kEmbeddings], *kept[kLabels], kept[kRefEmb], kept[kRefLabels], kept[kSelfIndex],
                        kept[kNumValidRefs]},
                       options.with(kept[kDynamicParams]),
                       kept[kRowWeights]};
    const auto [grad_emb, grad_ref, grad_params] =
        dispatch_backward(call, grads[0], *kept[kSaved], need_emb, need_ref, need_params);
    if (need_emb) result[0] = grad_emb;
    if (need_ref) result[1] = grad_ref;
    if (need_params) result[2] = grad_params;
    return result;
}

// The same for a graph of compiled autograd, which calls it with what apply_with_saved packed.
variable_list gradients_in_graph(const variable_list& grads, const std::vector<at::IValue>& packed) {
    compiled::PackedArgs args(packed);
    KeptTensors kept;
    for (OptionalTensor& x : kept) x = args.unpack<OptionalTensor>();
    OwnedOptions::Fields fields;
    std::apply([&](auto&... x) { ((x = args.unpack<std::decay_t<decltype(x)>>()), ...); }, fields);
    const bool need_emb = args.unpack<bool>(), need_ref = args.unpack<bool>(),
               need_params = args.unpack<bool>();
    return gradients(grads, kept, OwnedOptions(std::move(fields)), need_emb, need_ref, need_params);
}

// A node as those of torch's own functions, without the maps and lists that torch::autograd::Function keeps,
// and which torch.func can differentiate through, as it cannot through that class.
struct PairLossNode final : torch::autograd::Node {
    std::string name() const override { return "PairLossBackward"; }

    // `saved`, the op's second result, is no output of the node, as it has no gradient.
    void keep(const Call& call, const Tensor& saved) {
        const KeptTensors kept = {call.embeddings,  call.labels,         call.ref_emb,
                                  call.ref_labels,  call.self_index,     call.num_valid_refs,
                                  call.row_weights, call.dynamic_params, saved};
        for (int k = 0; k < kKept; ++k) kept_[k] = SavedVariable(kept[k], false);
        options_.emplace(call);
    }

    variable_list apply(variable_list&& grads) override {
        KeptTensors kept;
        {
            const std::lock_guard<std::mutex> lock(mutex_);  // of threads that go backward through one graph
            kept = unpack();
        }
        return gradients(grads, kept, *options_, task_should_compute_output(0), task_should_compute_output(1),
                         task_should_compute_output(2));
    }

    // For compiled autograd: what its graph depends on, and the call in it.
    void compiled_args(compiled::CompiledNodeArgs& args) const override {
        for (const SavedVariable& x : kept_) args.collect(x, false);
        std::apply([&](const auto&... x) { (args.collect(x), ...); }, options_->fields());
    }
    variable_list apply_with_saved(const variable_list& grads, compiled::SwapSavedVariables& swap) override {
        for (SavedVariable& x : kept_) swap.before(x);
        compiled::PackedArgs packed;
        for (const OptionalTensor& x : unpack()) packed.pack(x);
        std::apply([&](const auto&... x) { (packed.pack(x), ...); }, options_->fields());
        for (int k = 0; k < 3; ++k) packed.pack(task_should_compute_output(k));
        std::vector<at::TypePtr> types;
        for (const at::IValue& x : packed.vec())
            types.push_back(x.isTensor() ? at::TensorType::get() : x.type());
        const auto& compiler = compiled::getPyCompilerInterface();
        const std::string function =
            compiler->bind_function(swap.get_py_compiler(), name(), gradients_in_graph, types,
                                    /*is_custom_function=*/true, /*is_traceable=*/true);
        using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
        variable_list result = compiler->call_function(
            swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(),
            compiled::IValuePacker<Metadata>::pack(compiled::get_input_metadata(next_edges())));
        for (SavedVariable& x : kept_) swap.after(x);
        return result;
    }

    void release_variables() override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (SavedVariable& x : kept_) x.reset_data();
    }

   private:
    KeptTensors unpack() const {
        KeptTensors kept;
        for (int k = 0; k < kKept; ++k) {
            const Tensor x = kept_[k].unpack();
            if (x.defined()) kept[k] = x;
        }
        return kept;
    }

    std::array<SavedVariable, kKept> kept_;
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
