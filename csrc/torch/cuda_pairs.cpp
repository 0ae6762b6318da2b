// The ops on pairs for CUDA tensors: they allocate what the engine of csrc/cuda asks for and call it, on the
// current stream of the inputs' device, without host synchronisation.
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/indexed/listed_pairs.h"
#include "torch/columns.h"
#include "torch/cuda_inputs.h"
#include "torch/listed_ops.h"

namespace dml::cuda {
namespace {

using at::Tensor;

// Forward's workspace lies behind `saved` in one allocation, and stays until backward, where it takes less.
constexpr int64_t kWorkspaceBehindSaved = 256 << 10;

ForwardResult pair_loss(const Call& c) {
    check_inputs(c);
    check_one_direction(c);
    const c10::cuda::CUDAGuard guard(c.embeddings.device());
    Inputs in(c);
    const EntryPoints& engine = *in.engine;
    const int64_t saved_bytes = engine.saved_bytes(in.task),
                  workspace_bytes = engine.forward_workspace_bytes(in.task);
    const bool behind = workspace_bytes <= kWorkspaceBehindSaved;
    const Tensor saved = bytes(saved_bytes + (behind ? workspace_bytes : 0), c.embeddings);
    const Tensor apart = behind ? Tensor() : bytes(workspace_bytes, c.embeddings);
    auto* const start = static_cast<unsigned char*>(saved.mutable_data_ptr());
    saved.unsafeGetTensorImpl()->set_sizes_contiguous(saved_bytes);
    const Tensor loss = c.reduction == "none" || c.return_sums ? at::empty({loss_numel(c)}, in.accumulate)
                                                               : at::empty({}, in.accumulate);
    engine.forward(in.task, c.save_for_backward, start, loss.mutable_data_ptr(),
                   behind ? start + saved_bytes : apart.mutable_data_ptr(),
                   c10::cuda::getCurrentCUDAStream());
    return {loss, saved};
}

BackwardResult pair_loss_backward(const Call& c, const Tensor& grad_loss, const Tensor& saved, bool need_emb,
                                  bool need_ref, bool need_params) {
    check_inputs(c);
    check_one_direction(c);
    TORCH_CHECK_VALUE(!need_params || has_device_params(c, c.embeddings.device()),
                      "need_params: expected dynamic_params on the device of the embeddings");
    const c10::cuda::CUDAGuard guard(c.embeddings.device());
    Inputs in(c);
    Tensor grad_params = at::detail::empty_cpu({0}, at::kDouble);
    if (need_params) {
        grad_params = at::empty({in.params->numel()}, in.params->options());
        in.task.learned.gradient = grad_params.mutable_data_ptr<double>();
    }
    const EntryPoints& engine = *in.engine;
    check_backward(c, grad_loss, saved, engine.saved_bytes(in.task));
    const Tensor upstream = grad_loss.to(in.accumulate.dtype()).contiguous();
    const auto gradient = [&](const Tensor* points) {
        return points ? at::empty(points->sizes(), points->options())
                      : at::empty({0}, c.embeddings.options());
    };
    Tensor grad_emb = gradient(need_emb ? &c.embeddings : nullptr);
    Tensor grad_ref = gradient(need_ref && c.ref_emb ? &*c.ref_emb : nullptr);
    const int64_t workspace_bytes = engine.backward_workspace_bytes(in.task);
    const Tensor workspace = workspace_bytes > 0 ? bytes(workspace_bytes, c.embeddings) : Tensor();
    const auto data_or_null = [](const Tensor& x) { return x.numel() > 0 ? x.data_ptr() : nullptr; };
    engine.backward(in.task, saved.data_ptr(), upstream.const_data_ptr(), data_or_null(grad_emb),
                    data_or_null(grad_ref), workspace_bytes > 0 ? workspace.mutable_data_ptr() : nullptr,
                    c10::cuda::getCurrentCUDAStream());
    return {need_emb ? laid_out_as(c.embeddings, grad_emb) : grad_emb,
            need_ref && c.ref_emb ? laid_out_as(*c.ref_emb, grad_ref) : grad_ref, grad_params};
}

Tensor count_pairs_of_rows(const PairBatch& batch, std::optional<double> epsilon,
                           c10::string_view similarity) {
    check_batch(batch);
    const c10::cuda::CUDAGuard guard(batch.embeddings.device());
    Problem p;
    p.similarity = parse_similarity(similarity);
    p.mining = {epsilon.has_value(), epsilon.value_or(0.0)};
    const BatchInputs in(batch, p);
    const Points &queries = in.task.problem.queries, &refs = in.task.problem.refs;
    if (queries.count == 0 || refs.count == 0) return at::zeros({2, queries.count}, batch.labels.options());
    Tensor counts = at::empty({2, queries.count}, batch.labels.options());
    const Tensor workspace = bytes(count_workspace_bytes(in.task), batch.embeddings);
    count_pairs(in.task, counts.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
                c10::cuda::getCurrentCUDAStream());
    return counts;
}

// ---- pairs given as lists ----------------------------------------------------------------------------

template <typename T>
PointList<T> point_list(const Tensor& x) {
    return {x.const_data_ptr<T>(), x.size(0), x.size(1)};
}

Segments segments_of(const Tensor& offsets, const Tensor& of) {
    return {offsets.const_data_ptr<int64_t>(), offsets.numel() - 1, of.numel()};
}

Tensor pair_products(const Tensor& x, const Tensor& y, const Tensor& rows, const Tensor& cols,
                     const Tensor& row_offsets) {
    check_products(x, y, rows, cols, row_offsets);
    const c10::cuda::CUDAGuard guard(x.device());
    Tensor out = at::empty({rows.numel()}, x.options());
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "pair_products", [&] {
        multiply_pairs(point_list<scalar_t>(x), point_list<scalar_t>(y), rows.const_data_ptr<int64_t>(),
                       cols.const_data_ptr<int64_t>(), rows.numel(), out.data_ptr<scalar_t>(),
                       c10::cuda::getCurrentCUDAStream());
    });
    return out;
}

Tensor pair_sums(const Tensor& weights, const Tensor& points, const Tensor& index, const Tensor& offsets) {
    check_sums(weights, points, index, offsets);
    const c10::cuda::CUDAGuard guard(points.device());
    Tensor out = at::empty({offsets.numel() - 1, points.size(1)}, points.options());
    AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "pair_sums", [&] {
        sum_pairs(weights.const_data_ptr<scalar_t>(), point_list<scalar_t>(points),
                  index.const_data_ptr<int64_t>(), segments_of(offsets, index), out.data_ptr<scalar_t>(),
                  c10::cuda::getCurrentCUDAStream());
    });
    return out;
}

Tensor segment_logsumexp(const Tensor& logits, const Tensor& offsets, bool plus_one) {
    check_segments(logits, offsets);
    const c10::cuda::CUDAGuard guard(logits.device());
    Tensor out = at::empty({offsets.numel() - 1}, logits.options());
    AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "segment_logsumexp", [&] {
        log_sum_exps(logits.const_data_ptr<scalar_t>(), segments_of(offsets, logits), plus_one,
                     out.data_ptr<scalar_t>(), c10::cuda::getCurrentCUDAStream());
    });
    return out;
}

Tensor segment_softmax(const Tensor& grad, const Tensor& logits, const Tensor& value, const Tensor& offsets) {
    check_softmax(grad, logits, value, offsets);
    const c10::cuda::CUDAGuard guard(logits.device());
    Tensor out = at::empty(logits.sizes(), logits.options());
    AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "segment_softmax", [&] {
        softmaxes(grad.const_data_ptr<scalar_t>(), logits.const_data_ptr<scalar_t>(),
                  value.const_data_ptr<scalar_t>(), segments_of(offsets, logits), out.data_ptr<scalar_t>(),
                  c10::cuda::getCurrentCUDAStream());
    });
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CUDA, m) {
    m.impl("pair_loss", &FlatOp<&pair_loss>::call);
    m.impl("pair_loss_backward", &FlatOp<&pair_loss_backward>::call);
    m.impl("count_pairs", &FlatOp<&count_pairs_of_rows>::call);
    m.impl("pair_products", &pair_products);
    m.impl("pair_sums", &pair_sums);
    m.impl("segment_logsumexp", &segment_logsumexp);
    m.impl("segment_softmax", &segment_softmax);
}

}  // namespace dml::cuda
