// The ops on CUDA tensors: allocates what the engine of csrc/cuda asks for and calls it, on the current
// stream of the inputs' device. Nothing here waits for the device.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cuda/listed_pairs.h"
#include "cuda/pair_loss.h"
#include "listed_ops.h"
#include "ops.h"

namespace dml::cuda {
namespace {

using at::Tensor;

// As torch says that float32 matrices are multiplied on CUDA. Its older getter raises where the older and the
// newer way of saying so were mixed; it alone knows "medium", which the newer way calls tf32.
Precision precision_in_use() {
    const auto& context = at::globalContext();
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 10)
    const auto of = [&](at::Float32Backend backend) {
        return context.float32Precision(backend, at::Float32Op::MATMUL);
    };
    if (of(at::Float32Backend::CUDA) != at::Float32Precision::TF32) return Precision::kFull;
    if (of(at::Float32Backend::MKLDNN) != at::Float32Precision::BF16) return Precision::kTf32;
    const Precision unknown = Precision::kTf32;
#else
    const Precision unknown = Precision::kFull;
#endif
    try {
        switch (context.float32MatmulPrecision()) {
            case at::Float32MatmulPrecision::HIGH:
                return Precision::kTf32;
            case at::Float32MatmulPrecision::MEDIUM:
                return Precision::kBf16;
            default:
                return Precision::kFull;
        }
    } catch (const c10::Error&) {
        return unknown;
    }
}

// Rows may lie at any distance but must be contiguous in themselves.
Tensor with_dense_rows(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(); }

// The task, and the tensors that its pointers lead to.
struct Inputs {
    Tensor points, labels;
    OptionalTensor ref_points, ref_labels, self_ref, ref_count;
    Task task;
    const EntryPoints* engine = &kEntryPoints;
    at::TensorOptions accumulate;  // the type of losses and statistics

    explicit Inputs(const Call& c)
        : points(with_dense_rows(c.embeddings)), labels(c.labels.contiguous()), ref_count(c.ref_count) {
        task.problem = describe(c);
        Problem& p = task.problem;
        if (const LoadedLaw* own = loaded_law(p.law)) {
            TORCH_CHECK(own->cuda, "law: ", c.law, " was loaded without CUDA kernels");
            engine = own->cuda;
            p.law = {};  // the only one that its engine knows
        }
        p.queries = view(points, labels);
        p.refs = p.queries;
        if (c.ref_emb) {
            ref_points = with_dense_rows(*c.ref_emb);
            ref_labels = c.ref_labels->contiguous();
            p.refs = view(*ref_points, *ref_labels);
        }
        if (c.self_ref) self_ref = c.self_ref->contiguous();
        p.self_ref = self_ref ? self_ref->const_data_ptr<int64_t>() : nullptr;
        p.ref_count = ref_count ? ref_count->const_data_ptr<int64_t>() : nullptr;
        accumulate = c.embeddings.options().dtype(p.scalar == Scalar::kFloat64 ? at::kDouble : at::kFloat);
    }
    static Points view(const Tensor& x, const Tensor& labels) {
        return {x.const_data_ptr(), x.stride(0), labels.const_data_ptr<int64_t>(), x.size(0)};
    }
};

Tensor bytes(int64_t count, const Tensor& like) {
    return at::empty({count}, like.options().dtype(at::kByte));
}

// How float32 was multiplied in forward is how backward must see the same similarities. The host has to know
// without asking the device, so it is the number of bytes by which `saved` is longer than what it holds.
int64_t mark(Precision precision) { return static_cast<int64_t>(precision); }

ForwardResult pair_loss(const Call& c) {
    check_inputs(c);
    const c10::cuda::CUDAGuard guard(c.embeddings.device());
    Inputs in(c);
    if (in.task.problem.scalar == Scalar::kFloat32) in.task.precision = precision_in_use();
    const EntryPoints& engine = *in.engine;
    Tensor saved =
        bytes(engine.saved_bytes(in.task, c.save_for_backward) + mark(in.task.precision), c.embeddings);
    Tensor loss = in.task.problem.reduction == Reduction::kNone
                      ? at::empty({c.embeddings.size(0)}, in.accumulate)
                  : c.divide ? at::empty({}, in.accumulate)
                             : at::empty({4}, in.accumulate);
    const Tensor workspace = bytes(engine.forward_workspace_bytes(in.task), c.embeddings);
    engine.forward(in.task, c.save_for_backward, saved.data_ptr(), loss.data_ptr(), workspace.data_ptr(),
                   c10::cuda::getCurrentCUDAStream());
    return {loss, saved};
}

// Reads from the length of `saved` what forward was told and knew. Returns whether it kept tiles.
bool read_saved(const EntryPoints& engine, Task& task, int64_t length) {
    const int marks = task.problem.scalar == Scalar::kFloat32 ? kPrecisions : 1;
    for (int k = 0; k < marks; ++k) {
        task.precision = static_cast<Precision>(k);
        for (const bool saves : {true, false}) {
            if (length == engine.saved_bytes(task, saves) + k) return saves;
        }
    }
    task.precision = Precision::kFull;
    return true;
}

BackwardResult pair_loss_backward(const Call& c, const Backward& b) {
    check_inputs(c);
    const c10::cuda::CUDAGuard guard(c.embeddings.device());
    Inputs in(c);
    const EntryPoints& engine = *in.engine;
    const bool saves = read_saved(engine, in.task, b.saved.numel());
    check_backward(c, b, engine.saved_bytes(in.task, saves) + mark(in.task.precision));
    const Tensor upstream = b.grad_loss.to(in.accumulate.dtype()).contiguous();
    const auto gradient = [&](const Tensor* of) {
        return of ? at::empty(of->sizes(), of->options()) : at::empty({0}, c.embeddings.options());
    };
    Tensor grad_emb = gradient(b.need_emb ? &c.embeddings : nullptr);
    Tensor grad_ref = gradient(b.need_ref && c.ref_emb ? &*c.ref_emb : nullptr);
    const Tensor workspace = bytes(engine.backward_workspace_bytes(in.task), c.embeddings);
    const auto data_or_null = [](const Tensor& x) { return x.numel() > 0 ? x.data_ptr() : nullptr; };
    engine.backward(in.task, saves, b.saved.data_ptr(), upstream.const_data_ptr(), data_or_null(grad_emb),
                    data_or_null(grad_ref), workspace.data_ptr(), c10::cuda::getCurrentCUDAStream());
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
    m.impl("pair_loss", &pair_loss_op<pair_loss>);
    m.impl("pair_loss_backward", &pair_loss_backward_op<pair_loss_backward>);
    m.impl("pair_products", &pair_products);
    m.impl("pair_sums", &pair_sums);
    m.impl("segment_logsumexp", &segment_logsumexp);
    m.impl("segment_softmax", &segment_softmax);
}

}  // namespace dml::cuda
