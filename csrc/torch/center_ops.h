// The ops on classes with several centres, for every device: a block of classes at a time, whose products with the
// rows PyTorch makes. What lies between products are the device's kernels:
//   forward, backward  of a block (core/centers.h); forward fills losses [N] and saved [3, N] with the last one
//   inverse_lengths    1 / length of points, 0 for tiny ones
//   through_norm       a gradient by unit points, times 1 / length, to that by the points, in place
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "core/centers.h"
#include "core/tiny_norm.h"
#include "torch/ops.h"

namespace dml {

inline CenterLoss parse_center_loss(c10::string_view name) {
    if (name == "soft_triple") return CenterLoss::kSoftTriple;
    TORCH_CHECK_VALUE(name == "sub_centers", "loss: expected soft_triple or sub_centers, got \"", name, "\"");
    return CenterLoss::kSubCenters;
}

// What forward and backward are given.
struct CenterCall {
    at::Tensor embeddings, centers, labels;  // [N, D], [C K, D], [N]
    OptionalTensor learned;                  // [3] float64, in place of params
    int64_t per_class;
    CenterLoss loss;
    at::ArrayRef<double> params;
    int64_t block;  // products in memory at once

    CenterCall(const at::Tensor& embeddings, const at::Tensor& centers, const at::Tensor& labels,
               const OptionalTensor& learned, int64_t per_class, c10::string_view loss,
               at::ArrayRef<double> params, int64_t block)
        : embeddings(embeddings),
          centers(centers),
          labels(labels),
          learned(learned),
          per_class(per_class),
          loss(parse_center_loss(loss)),
          params(params),
          block(block) {
        check_points(embeddings, labels, "embeddings");
        parse_scalar(embeddings.scalar_type());
        TORCH_CHECK_VALUE(centers.dim() == 2 && centers.size(1) == embeddings.size(1),
                          "centers: expected two dimensions and ", embeddings.size(1), " columns, got ",
                          centers.sizes());
        TORCH_CHECK_VALUE(
            per_class > 0 && centers.size(0) > 0 && centers.size(0) % per_class == 0,
            "per_class: expected a divisor of the number of centers, which is above 0 and here ",
            centers.size(0), ", got ", per_class);
        TORCH_CHECK_TYPE(centers.scalar_type() == embeddings.scalar_type(), "centers: expected ",
                         embeddings.scalar_type(), ", got ", centers.scalar_type());
        TORCH_CHECK_VALUE(centers.device() == embeddings.device(), "centers: on ", centers.device(),
                          ", but embeddings on ", embeddings.device());
        if (!learned) {
            TORCH_CHECK_VALUE(params.size() == kCenterParams, "params: expected ", kCenterParams,
                              " numbers, got ", params.size());
            return;
        }
        TORCH_CHECK_VALUE(
            learned->dim() == 1 && learned->numel() == kCenterParams &&
                learned->scalar_type() == at::kDouble && learned->device() == embeddings.device(),
            "learned: expected ", kCenterParams, " numbers in float64 on ", embeddings.device(), ", got ",
            learned->scalar_type(), " of shape ", learned->sizes(), " on ", learned->device());
    }
};

// The rows in the type that is computed in, and the classes block by block.
template <typename T, typename Kernels>
class CenterBlocks {
   public:
    explicit CenterBlocks(const CenterCall& call)
        : loss(call.loss),
          type(c10::CppTypeToScalarType<T>::value),
          x(call.embeddings.to(type).contiguous()),
          row_inverse(Kernels::template inverse_lengths<T>(x)),
          call_(call),
          labels_(call.labels.contiguous()) {
        params = {};
        std::copy(call.params.begin(), call.params.end(), params.numbers);
        if (call.learned) {
            learned_ = call.learned->contiguous();
            params.in_memory = learned_.template const_data_ptr<double>();
        }
    }

    const CenterLoss loss;
    const at::ScalarType type;
    const at::Tensor x, row_inverse;  // [N, D], [N]
    CenterParams params;

    // Calls visit(block, products [N, centres], first centre, centres [., D] of the type, their inverse lengths).
    template <typename Visit>
    void for_each(const Visit& visit) const {
        const int64_t n = x.size(0), dim = x.size(1), per_class = call_.per_class;
        const int64_t classes = call_.centers.size(0) / per_class;
        // Centres of another type are copied, which counts too.
        const int64_t lines = std::max<int64_t>({n, 1, call_.centers.scalar_type() == type ? 0 : dim});
        const int64_t most =
            std::clamp<int64_t>(call_.block / (lines * per_class), 1, std::max<int64_t>(classes, 1));
        const at::Tensor memory = at::empty({n * std::min(most, classes) * per_class}, x.options());
        for (int64_t first = 0; first < classes; first += most) {
            const int64_t count = std::min(most, classes - first), width = count * per_class;
            const at::Tensor w = call_.centers.narrow(0, first * per_class, width).to(type);
            const at::Tensor inverse = Kernels::template inverse_lengths<T>(w);
            at::Tensor s = memory.narrow(0, 0, n * width).view({n, width});
            at::mm_out(s, x, w.t());
            const CenterBlock<T> block = {s.data_ptr<T>(),
                                          n,
                                          count,
                                          per_class,
                                          first,
                                          classes,
                                          row_inverse.template const_data_ptr<T>(),
                                          inverse.template const_data_ptr<T>(),
                                          labels_.template const_data_ptr<int64_t>()};
            visit(block, s, first * per_class, w, inverse);
        }
    }

   private:
    const CenterCall& call_;
    const at::Tensor labels_;
    at::Tensor learned_;
};

// The rows' losses [N], 0 where the label is no class, and what backward needs of them [3, N].
template <typename T, typename Kernels>
std::tuple<at::Tensor, at::Tensor> center_losses(const CenterCall& call) {
    const CenterBlocks<T, Kernels> blocks(call);
    const int64_t n = blocks.x.size(0);
    const at::Tensor losses = at::empty({n}, blocks.x.options()),
                     saved = at::empty({3, n}, blocks.x.options());
    const at::Tensor rows = at::empty({n, int64_t(sizeof(CenterRow<T>) / sizeof(T))}, blocks.x.options());
    blocks.for_each(
        [&](const CenterBlock<T>& block, const at::Tensor&, int64_t, const at::Tensor&, const at::Tensor&) {
            Kernels::forward(block, blocks.loss, blocks.params,
                             reinterpret_cast<CenterRow<T>*>(rows.data_ptr<T>()), losses.data_ptr<T>(),
                             saved.data_ptr<T>());
        });
    return {losses, saved};
}

using CenterGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // by embeddings, centers, learned

template <typename T, typename Kernels>
CenterGradients center_gradients(const CenterCall& call, const at::Tensor& grad_losses,
                                 const at::Tensor& saved, bool need_emb, bool need_centers,
                                 bool need_params) {
    const CenterBlocks<T, Kernels> blocks(call);
    const auto options = blocks.x.options();
    const int64_t n = blocks.x.size(0);
    const at::Tensor grad = grad_losses.to(options).contiguous(), of_forward = saved.contiguous();
    at::Tensor by_x = at::empty(need_emb ? blocks.x.sizes() : at::IntArrayRef({0}), options);
    at::Tensor by_centers =
        need_centers ? at::empty_like(call.centers) : at::empty({0}, call.centers.options());
    const at::Tensor by_params = at::zeros({need_params ? n : 0, kCenterParams}, options.dtype(at::kDouble));
    blocks.for_each([&](const CenterBlock<T>& block, const at::Tensor& weights, int64_t first,
                        const at::Tensor& w, const at::Tensor& inverse) {
        Kernels::backward(block, blocks.loss, blocks.params, grad.const_data_ptr<T>(),
                          of_forward.const_data_ptr<T>(),
                          need_params ? by_params.data_ptr<double>() : nullptr);
        if (need_emb && block.is_first()) {
            at::mm_out(by_x, weights, w);
        } else if (need_emb) {
            by_x.addmm_(weights, w);
        }
        if (!need_centers) return;
        at::Tensor here = by_centers.narrow(0, first, w.size(0));
        at::Tensor by_w = here.scalar_type() == blocks.type ? here : at::empty_like(w);
        at::mm_out(by_w, weights.t(), blocks.x);
        Kernels::template through_norm<T>(by_w, w, inverse);
        if (!by_w.is_same(here)) here.copy_(by_w);
    });
    if (need_emb) Kernels::template through_norm<T>(by_x, blocks.x, blocks.row_inverse);
    return {by_x.to(call.embeddings.scalar_type()), by_centers,
            need_params ? by_params.sum(0) : by_params.new_empty({0})};
}

template <typename Kernels>
std::tuple<at::Tensor, at::Tensor> center_softmax(const at::Tensor& embeddings, const at::Tensor& centers,
                                                  const at::Tensor& labels, const OptionalTensor& learned,
                                                  int64_t per_class, c10::string_view loss,
                                                  at::ArrayRef<double> params, int64_t block) {
    const CenterCall call(embeddings, centers, labels, learned, per_class, loss, params, block);
    const typename Kernels::Guard guard(embeddings.device());
    const bool wide = embeddings.scalar_type() == at::kDouble;
    return wide ? center_losses<double, Kernels>(call) : center_losses<float, Kernels>(call);
}

template <typename Kernels>
CenterGradients center_softmax_backward(const at::Tensor& grad_losses, const at::Tensor& embeddings,
                                        const at::Tensor& centers, const at::Tensor& labels,
                                        const OptionalTensor& learned, const at::Tensor& saved,
                                        int64_t per_class, c10::string_view loss, at::ArrayRef<double> params,
                                        int64_t block, bool need_emb, bool need_centers, bool need_params) {
    const CenterCall call(embeddings, centers, labels, learned, per_class, loss, params, block);
    const int64_t n = embeddings.size(0);
    const bool wide = embeddings.scalar_type() == at::kDouble;
    TORCH_CHECK_VALUE(grad_losses.sizes() == at::IntArrayRef({n}), "grad_losses: expected ", n,
                      " numbers, got shape ", grad_losses.sizes());
    TORCH_CHECK_VALUE(
        saved.sizes() == at::IntArrayRef({3, n}) && saved.scalar_type() == (wide ? at::kDouble : at::kFloat),
        "saved: expected what forward saved, got ", saved.scalar_type(), " of shape ", saved.sizes());
    const typename Kernels::Guard guard(embeddings.device());
    const auto run = wide ? center_gradients<double, Kernels> : center_gradients<float, Kernels>;
    return run(call, grad_losses, saved, need_emb, need_centers, need_params && learned);
}

}  // namespace dml
