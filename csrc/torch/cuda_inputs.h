// From the arguments of a call to a task of the CUDA engine. What the ops on CUDA tensors share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "cuda/pairs/pair_loss.h"
#include "torch/ops.h"

namespace dml::cuda {

using at::Tensor;

// Rows may lie at any distance but must be contiguous in themselves.
inline Tensor with_dense_rows(const Tensor& x) {
    return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

// The engine of a problem's formula. That of a loaded formula knows no other, and numbers it 0.
inline const EntryPoints* engine_of(Problem& p, std::string_view formula) {
    const CustomFormula* custom = custom_formula(p.formula);
    TORCH_CHECK(custom || formula_named(formula)->on_cuda, "formula: ", formula, " has no CUDA kernels");
    if (!custom) return &kEntryPoints;
    TORCH_CHECK(custom->cuda, "formula: ", formula, " was loaded without CUDA kernels");
    p.formula = {};
    return custom->cuda;
}

// Other types are multiplied in themselves, whatever the precision.
inline Precision precision_of(const PairOptions& o, Scalar scalar) {
    return is_tf32(o.precision) && scalar == Scalar::kFloat32 ? Precision::kTf32 : Precision::kFull;
}

// Whether parameters are read from device memory, and may learn.
inline bool has_device_params(const PairOptions& o, c10::Device device) {
    return o.dynamic_params && o.dynamic_params->device() == device && o.dynamic_params->numel() > 1;
}
// Then the task reads them there. Returns the tensor that holds them.
inline OptionalTensor set_learned(Task& task, const PairOptions& o, c10::Device device) {
    if (!has_device_params(o, device)) return {};
    const Tensor params = o.dynamic_params->contiguous();
    task.learned.count = int(params.numel()) - 1;
    task.learned.values = params.const_data_ptr<double>();
    return params;
}

// A task on a batch, and the tensors that its pointers lead to.
struct BatchInputs {
    Tensor points, labels;
    OptionalTensor ref_points, ref_labels, self_index, num_valid_refs;
    Task task;

    BatchInputs(const PairBatch& c, const Problem& problem)
        : points(with_dense_rows(c.embeddings)),
          labels(c.labels.contiguous()),
          num_valid_refs(c.num_valid_refs) {
        task.problem = problem;
        Problem& p = task.problem;
        describe_batch(c, p);
        p.queries = view(points, labels);
        p.refs = p.queries;
        if (c.ref_emb) {
            ref_points = with_dense_rows(*c.ref_emb);
            ref_labels = c.ref_labels->contiguous();
            p.refs = view(*ref_points, *ref_labels);
        }
        if (c.self_index) self_index = c.self_index->contiguous();
        p.self_index = self_index ? self_index->const_data_ptr<int64_t>() : nullptr;
        p.num_valid_refs = num_valid_refs ? num_valid_refs->const_data_ptr<int64_t>() : nullptr;
    }
    static Points view(const Tensor& x, const Tensor& labels) {
        return {x.const_data_ptr(), x.stride(0), labels.const_data_ptr<int64_t>(), x.size(0)};
    }
};

// The same of a loss.
struct Inputs : BatchInputs {
    OptionalTensor row_weights, params;
    const EntryPoints* engine;
    at::TensorOptions accumulate;  // the type of losses and sums

    explicit Inputs(const Call& c)
        : BatchInputs(c, describe(static_cast<const PairOptions&>(c), c.embeddings.device())) {
        Problem& p = task.problem;
        engine = engine_of(p, c.formula);
        task.precision = precision_of(c, p.scalar);
        accumulate = c.embeddings.options().dtype(p.scalar == Scalar::kFloat64 ? at::kDouble : at::kFloat);
        if (c.row_weights) {
            row_weights = c.row_weights->to(accumulate.dtype()).contiguous();
            task.row_weights = row_weights->const_data_ptr();
        }
        if (c.kept_bytes() >= 0) task.tuning.cache_bytes = c.kept_bytes();
        params = set_learned(task, c, c.embeddings.device());
    }
};

// What the CUDA kernels do not have; dml_cuda/_ops/evaluate.py goes other ways.
inline void check_one_direction(const Call& c) {
    TORCH_CHECK_NOT_IMPLEMENTED(!c.both_directions, "both_directions: the CUDA kernels know one");
}

inline Tensor bytes(int64_t count, const Tensor& like) {
    return at::empty({count}, like.options().dtype(at::kByte));
}

}  // namespace dml::cuda
