// The ops on CUDA tensors: allocates what the engine of csrc/cuda asks for and calls it, on the current
// stream of the inputs' device. Nothing here waits for the device.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda/pair_loss.h"
#include "cuda/pairs.h"
#include "listed_ops.h"
#include "ops.h"

namespace dml::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Scalar scalar_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kHalf:
            return Scalar::kFloat16;
        case at::kBFloat16:
            return Scalar::kBFloat16;
        case at::kFloat:
            return Scalar::kFloat32;
        case at::kDouble:
            return Scalar::kFloat64;
        default:
            TORCH_CHECK_TYPE(false, "embeddings: expected float16, bfloat16, float32 or float64, got ",
                             x.scalar_type());
    }
}

// As torch.set_float32_matmul_precision says.
Precision precision_in_use() {
    switch (at::globalContext().float32MatmulPrecision()) {
        case at::Float32MatmulPrecision::HIGH:
            return Precision::kTf32;
        case at::Float32MatmulPrecision::MEDIUM:
            return Precision::kBf16;
        default:
            return Precision::kFull;
    }
}

cuda::Reduction reduction_of(std::string_view name) {
    return static_cast<cuda::Reduction>(parse_reduction(name));
}

// One side of the pairs. Rows may lie at any distance but must be contiguous in themselves.
struct Side {
    Tensor points;  // [N, D]
    Tensor labels;  // [N]

    Side(const Tensor& x, const Tensor& its_labels)
        : points(x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous()), labels(its_labels.contiguous()) {}

    Points view() const {
        return {points.const_data_ptr(), points.stride(0), labels.const_data_ptr<int64_t>(), points.size(0)};
    }
};

// The problem, and the tensors that its pointers lead to.
struct Inputs {
    Side queries;
    std::optional<Side> refs;
    OptionalTensor self_ref, ref_count;
    Problem problem;
    at::TensorOptions accumulate;  // the type of losses and statistics

    Inputs(const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
           const OptionalTensor& ref_labels, const OptionalTensor& own_ref, const OptionalTensor& count,
           c10::string_view loss, at::ArrayRef<double> params, bool normalize, c10::string_view reduction)
        : queries(embeddings, labels), ref_count(count) {
        if (ref_emb) refs.emplace(*ref_emb, *ref_labels);
        if (own_ref) self_ref = own_ref->contiguous();
        problem.queries = queries.view();
        problem.refs = refs ? refs->view() : problem.queries;
        problem.square = !refs;
        problem.self_ref = self_ref ? self_ref->const_data_ptr<int64_t>() : nullptr;
        problem.ref_count = ref_count ? ref_count->const_data_ptr<int64_t>() : nullptr;
        problem.dim = embeddings.size(1);
        problem.scalar = scalar_of(embeddings);
        problem.precision = precision_in_use();
        problem.loss = parse_loss(loss, params);
        std::copy(params.begin(), params.end(), problem.params);
        problem.normalize = normalize;
        problem.reduction = reduction_of(reduction);
        const bool wide = embeddings.scalar_type() == at::kDouble;
        accumulate = embeddings.options().dtype(wide ? at::kDouble : at::kFloat);
    }
};

template <typename T>
T* data_or_null(const Tensor& x) {
    return x.numel() > 0 ? static_cast<T*>(x.data_ptr()) : nullptr;
}

Tensor workspace_of(int64_t bytes, const Tensor& like) {
    return at::empty({bytes}, like.options().dtype(at::kByte));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_loss(
    const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
    const OptionalTensor& ref_labels, const OptionalTensor& self_ref, const OptionalTensor& ref_count,
    c10::string_view loss, at::ArrayRef<double> params, std::optional<double> epsilon, bool normalize,
    c10::string_view reduction, bool save_for_backward) {
    check_inputs(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count);
    const c10::cuda::CUDAGuard guard(embeddings.device());
    const Inputs in(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, loss, params, normalize,
                    reduction);
    const SavedSizes sizes = saved_sizes(in.problem, save_for_backward);
    Tensor stats = at::empty({sizes.stats}, in.accumulate);
    Tensor plan = at::empty({sizes.plan}, in.accumulate.dtype(at::kInt));
    Tensor tiles = at::empty({sizes.tiles}, in.accumulate);
    Tensor kept = at::empty({sizes.kept}, in.accumulate.dtype(at::kByte));
    Tensor result = in.problem.reduction == cuda::Reduction::kNone
                        ? at::empty({embeddings.size(0)}, in.accumulate)
                        : at::empty({}, in.accumulate);
    const Tensor workspace = workspace_of(forward_workspace_bytes(in.problem), embeddings);
    forward(in.problem, {epsilon.has_value(), epsilon.value_or(0.0)},
            {stats.data_ptr(), data_or_null<int32_t>(plan), data_or_null<void>(tiles),
             data_or_null<uint8_t>(kept)},
            result.data_ptr(), workspace.data_ptr(), c10::cuda::getCurrentCUDAStream());
    return {result, stats, plan, tiles, kept};
}

std::tuple<Tensor, Tensor> pair_loss_backward(
    const Tensor& grad_loss, const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
    const OptionalTensor& ref_labels, const OptionalTensor& self_ref, const OptionalTensor& ref_count,
    const Tensor& stats, const Tensor& plan, const Tensor& tiles, const Tensor& kept, c10::string_view loss,
    at::ArrayRef<double> params, bool normalize, c10::string_view reduction, bool need_emb, bool need_ref) {
    check_inputs(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count);
    const c10::cuda::CUDAGuard guard(embeddings.device());
    const Inputs in(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, loss, params, normalize,
                    reduction);
    const SavedSizes sizes = saved_sizes(in.problem, tiles.numel() > 0);
    TORCH_CHECK_VALUE(stats.numel() == sizes.stats && plan.numel() == sizes.plan &&
                          tiles.numel() == sizes.tiles && kept.numel() == sizes.kept,
                      "stats, plan, tiles, kept: not those of a forward pass over these inputs");
    const Tensor upstream = grad_loss.to(stats.scalar_type()).contiguous();
    const auto gradient = [&](const Tensor* of) {
        return of ? at::empty(of->sizes(), of->options()) : at::empty({0}, embeddings.options());
    };
    const bool ref_wanted = need_ref && ref_emb.has_value();
    Tensor grad_emb = gradient(need_emb ? &embeddings : nullptr);
    Tensor grad_ref = gradient(ref_wanted ? &*ref_emb : nullptr);
    const Tensor workspace = workspace_of(backward_workspace_bytes(in.problem), embeddings);
    backward(in.problem,
             {stats.data_ptr(), data_or_null<int32_t>(plan), data_or_null<void>(tiles),
              data_or_null<uint8_t>(kept)},
             upstream.const_data_ptr(), data_or_null<void>(grad_emb), data_or_null<void>(grad_ref),
             workspace.data_ptr(), c10::cuda::getCurrentCUDAStream());
    return {grad_emb, grad_ref};
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
    m.impl("pair_loss", &pair_loss);
    m.impl("pair_loss_backward", &pair_loss_backward);
    m.impl("pair_products", &pair_products);
    m.impl("pair_sums", &pair_sums);
    m.impl("segment_logsumexp", &segment_logsumexp);
    m.impl("segment_softmax", &segment_softmax);
}

}  // namespace dml::cuda
