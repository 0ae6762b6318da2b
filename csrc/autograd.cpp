// The derivative of pair_loss. In C++, because a small batch is all overhead: registered from Python the
// same costs 80 us more a step, as much as the kernels of 128 rows.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

namespace dml {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Results redispatch(const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
                   const OptionalTensor& ref_labels, const OptionalTensor& self_ref,
                   const OptionalTensor& ref_count, c10::string_view loss, at::ArrayRef<double> params,
                   std::optional<double> epsilon, bool normalize, c10::string_view reduction,
                   bool save_for_backward) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dml_cuda::pair_loss", "")
                               .typed<decltype(redispatch)>();
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, loss, params, epsilon,
                   normalize, reduction, save_for_backward);
}

std::tuple<Tensor, Tensor> pair_loss_backward(
    const Tensor& grad_loss, const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
    const OptionalTensor& ref_labels, const OptionalTensor& self_ref, const OptionalTensor& ref_count,
    const Tensor& stats, const Tensor& plan, const Tensor& tiles, const Tensor& kept, c10::string_view loss,
    at::ArrayRef<double> params, bool normalize, c10::string_view reduction, bool need_emb, bool need_ref);

OptionalTensor if_defined(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

// The gradient as a node of its own, so that differentiating it says why that does not work.
struct PairLossGradient : torch::autograd::Function<PairLossGradient> {
    static variable_list forward(AutogradContext*, const Tensor& grad_loss, const Tensor& embeddings,
                                 const Tensor& labels, const OptionalTensor& ref_emb,
                                 const OptionalTensor& ref_labels, const OptionalTensor& self_ref,
                                 const OptionalTensor& ref_count, const Tensor& stats, const Tensor& plan,
                                 const Tensor& tiles, const Tensor& kept, c10::string_view loss,
                                 at::ArrayRef<double> params, bool normalize, c10::string_view reduction,
                                 bool need_emb, bool need_ref) {
        static const auto op = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("dml_cuda::pair_loss_backward", "")
                                   .typed<decltype(pair_loss_backward)>();
        const at::AutoDispatchBelowADInplaceOrView below;
        const auto [grad_emb, grad_ref] =
            op.call(grad_loss, embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, stats, plan,
                    tiles, kept, loss, params, normalize, reduction, need_emb, need_ref);
        return {grad_emb, grad_ref};
    }
    static variable_list backward(AutogradContext*, const variable_list&) {
        TORCH_CHECK(false,
                    "the fused losses of dml_cuda have no second derivative: pass backend=\"reference\" to "
                    "differentiate their gradient");
    }
};

struct PairLossNode : torch::autograd::Function<PairLossNode> {
    static variable_list forward(AutogradContext* ctx, const Tensor& embeddings, const Tensor& labels,
                                 const OptionalTensor& ref_emb, const OptionalTensor& ref_labels,
                                 const OptionalTensor& self_ref, const OptionalTensor& ref_count,
                                 c10::string_view loss, at::ArrayRef<double> params,
                                 std::optional<double> epsilon, bool normalize, c10::string_view reduction,
                                 bool save_for_backward) {
        const auto [value, stats, plan, tiles, kept] =
            redispatch(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, loss, params, epsilon,
                       normalize, reduction, save_for_backward);
        const auto saved = [](const OptionalTensor& x) { return x ? *x : Tensor(); };
        ctx->save_for_backward({embeddings, labels, saved(ref_emb), saved(ref_labels), saved(self_ref),
                                saved(ref_count), stats, plan, tiles, kept});
        ctx->saved_data["loss"] = std::string(loss);
        ctx->saved_data["params"] = params.vec();
        ctx->saved_data["normalize"] = normalize;
        ctx->saved_data["reduction"] = std::string(reduction);
        ctx->saved_data["need_emb"] = embeddings.requires_grad();
        ctx->saved_data["need_ref"] = ref_emb && ref_emb->requires_grad();
        ctx->mark_non_differentiable({stats, plan, tiles, kept});
        ctx->set_materialize_grads(false);
        return {value, stats, plan, tiles, kept};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list result(12);
        if (!grads[0].defined()) return result;
        auto& data = ctx->saved_data;
        const bool need_emb = data["need_emb"].toBool(), need_ref = data["need_ref"].toBool();
        const variable_list saved = ctx->get_saved_variables();
        const auto [grad_emb, grad_ref] = pair_loss_backward(
            grads[0], saved[0], saved[1], if_defined(saved[2]), if_defined(saved[3]), if_defined(saved[4]),
            if_defined(saved[5]), saved[6], saved[7], saved[8], saved[9], data["loss"].toStringView(),
            data["params"].toDoubleVector(), data["normalize"].toBool(), data["reduction"].toStringView(),
            need_emb, need_ref);
        if (need_emb) result[0] = grad_emb;
        if (need_ref) result[2] = grad_ref;
        return result;
    }
};

Results pair_loss(const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
                  const OptionalTensor& ref_labels, const OptionalTensor& self_ref,
                  const OptionalTensor& ref_count, c10::string_view loss, at::ArrayRef<double> params,
                  std::optional<double> epsilon, bool normalize, c10::string_view reduction,
                  bool save_for_backward) {
    const bool differentiable =
        at::GradMode::is_enabled() && (embeddings.requires_grad() || (ref_emb && ref_emb->requires_grad()));
    if (!differentiable) {
        return redispatch(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, loss, params, epsilon,
                          normalize, reduction, save_for_backward);
    }
    const variable_list out =
        PairLossNode::apply(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, loss, params,
                            epsilon, normalize, reduction, save_for_backward);
    return {out[0], out[1], out[2], out[3], out[4]};
}

std::tuple<Tensor, Tensor> pair_loss_backward(
    const Tensor& grad_loss, const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
    const OptionalTensor& ref_labels, const OptionalTensor& self_ref, const OptionalTensor& ref_count,
    const Tensor& stats, const Tensor& plan, const Tensor& tiles, const Tensor& kept, c10::string_view loss,
    at::ArrayRef<double> params, bool normalize, c10::string_view reduction, bool need_emb, bool need_ref) {
    const variable_list found = PairLossGradient::apply(grad_loss, embeddings, labels, ref_emb, ref_labels,
                                                        self_ref, ref_count, stats, plan, tiles, kept, loss,
                                                        params, normalize, reduction, need_emb, need_ref);
    return {found[0], found[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, Autograd, m) {
    m.impl("pair_loss", &pair_loss);
    m.impl("pair_loss_backward", &pair_loss_backward);
}

}  // namespace dml
