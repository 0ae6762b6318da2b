// The ops on blocks of columns (cpu/blocks.cpp says what they are) on CUDA tensors: allocates what the engine
// of cuda/blocks.h asks for and calls it, on the current stream of the inputs' device. Nothing here waits for
// the device.
//
// How float32 is multiplied is read once, when a state is made, and is then the number of elements by which
// states and weights are longer than what they hold: so all stages and backward see the same similarities.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/ring/ring.h"
#include "torch/cuda_inputs.h"
#include "torch/ring_ops.h"

namespace dml::cuda {
namespace {

BlockStage parse_stage(std::string_view name, std::optional<double> epsilon) {
    if (name == "hardest") {
        TORCH_CHECK_VALUE(epsilon, "epsilon: expected a number in stage \"hardest\"");
        return BlockStage::kHardest;
    }
    if (name == "negatives") return BlockStage::kNegatives;
    if (name == "positives") return BlockStage::kPositives;
    TORCH_CHECK_VALUE(name == "both", "stage: unknown \"", name, "\"");
    return BlockStage::kBoth;
}

// What a state, or weights, tell of how they were made.
Precision check_state(const Tensor& state, int64_t rows, at::ScalarType type, c10::Device device,
                      const char* name) {
    const int64_t numbers = state_numbers(rows), mark = state.numel() - numbers;
    TORCH_CHECK_VALUE(state.dim() == 1 && mark >= 0 && mark < kPrecisions && state.is_contiguous() &&
                          state.scalar_type() == type && state.device() == device,
                      name, ": expected ", type, " of shape [", numbers, "] on ", device, ", got ",
                      state.scalar_type(), " ", state.sizes(), " on ", state.device());
    return static_cast<Precision>(mark);
}

// A task of rows without their points.
struct RowTask {
    Task task;
    const BlockEntryPoints* engine;

    RowTask(c10::string_view formula, at::ArrayRef<double> params, bool mining, double epsilon, bool wide,
            int64_t rows) {
        Problem& p = task.problem;
        p.formula = find_formula(formula, params).id;
        engine = engine_of(p, formula)->blocks;
        std::copy(params.begin(), params.end(), p.params);
        p.mining = {mining, epsilon};
        p.scalar = wide ? Scalar::kFloat64 : Scalar::kFloat32;
        p.queries.count = rows;
    }
};

Tensor turn(const OptionalTensor& before, const Tensor& pairs, c10::string_view formula,
            at::ArrayRef<double> params, std::optional<double> epsilon, c10::string_view stage_name,
            bool wide) {
    check_pair_counts(pairs);
    const c10::cuda::CUDAGuard guard(pairs.device());
    const int64_t rows = pairs.size(1);
    const at::ScalarType type = wide ? at::kDouble : at::kFloat;
    const RowTask of(formula, params, epsilon.has_value(), epsilon.value_or(0.0), wide, rows);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (stage_name == "start") {
        const int64_t mark = wide ? 0 : static_cast<int64_t>(precision_in_use());
        Tensor state = at::empty({state_numbers(rows) + mark}, pairs.options().dtype(type));
        of.engine->turn(of.task, BlockStage::kStart, state.data_ptr(), stream);
        return state;
    }
    const BlockStage stage = parse_stage(stage_name, epsilon);
    TORCH_CHECK_VALUE(before, "state: expected one in every stage but \"start\"");
    check_state(*before, rows, type, pairs.device(), "state");
    Tensor state = before->clone();
    of.engine->turn(of.task, stage, state.data_ptr(), stream);
    return state;
}

// A block's points as the engine sees them.
struct BlockInputs : BlockCall {
    const Inputs in;
    const BlockEntryPoints& engine;
    const at::ScalarType type;

    template <typename... Arguments>
    explicit BlockInputs(const Arguments&... arguments)
        : BlockCall(arguments...),
          in(call),
          engine(*in.engine->blocks),
          type(call.embeddings.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {}

    // The task, multiplied as a state says.
    Task task(Precision precision) const {
        Task of = in.task;
        if (of.problem.scalar == Scalar::kFloat32) of.precision = precision;
        return of;
    }
    bool empty() const { return in.task.problem.queries.count == 0 || in.task.problem.refs.count == 0; }
};

// found: what the stages before have found in this block, or none. As a stage returns it: "hardest" the
// tiles' extremes, the others their kept flags, "negatives" behind the extremes that it was given.
std::tuple<Tensor, Tensor> add(const Tensor& before, const Tensor& embeddings, const Tensor& labels,
                               const Tensor& block, const Tensor& block_labels,
                               const OptionalTensor& self_index, c10::string_view formula,
                               at::ArrayRef<double> params, std::optional<double> epsilon,
                               c10::string_view similarity, c10::string_view reduction,
                               c10::string_view stage_name, const OptionalTensor& found) {
    const c10::cuda::CUDAGuard guard(embeddings.device());
    const BlockInputs of(embeddings, labels, block, block_labels, self_index, formula, params, epsilon,
                         similarity, reduction);
    const BlockStage stage = parse_stage(stage_name, epsilon);
    const Precision precision =
        check_state(before, embeddings.size(0), of.type, embeddings.device(), "state");
    const Task task = of.task(precision);
    const BlockSizes sizes = of.engine.sizes(task);

    const bool second = stage == BlockStage::kPositives;
    int64_t given = 0;
    if (stage != BlockStage::kHardest && (found || second)) {
        const int64_t flags = second ? sizes.kept : 0;
        given = found ? found->numel() - flags : -1;
        TORCH_CHECK_VALUE(found && (given == 0 || given == sizes.extremes) && found->is_contiguous() &&
                              found->scalar_type() == at::kByte && found->device() == embeddings.device(),
                          "found: expected ", flags, " or ", flags + sizes.extremes,
                          " bytes of the stage before, got ", found ? found->numel() : 0);
    }
    const auto zeros = [&](int64_t count) {
        return at::zeros({count}, embeddings.options().dtype(at::kByte));
    };
    // Extremes come first: a buffer is aligned at its beginning.
    Tensor result;
    if (stage == BlockStage::kHardest) {
        result = bytes(sizes.extremes, embeddings);
    } else if (stage == BlockStage::kNegatives && given > 0) {
        result = at::cat({*found, zeros(sizes.kept)});
    } else {
        result = second ? found->narrow(0, given, sizes.kept).clone() : zeros(sizes.kept);
    }
    Tensor state = before.clone();
    if (of.empty()) return {state, result};
    auto* own = static_cast<uint8_t*>(result.data_ptr());
    const bool finds = stage == BlockStage::kHardest;
    void* extremes = given > 0 ? found->data_ptr() : finds && sizes.extremes > 0 ? own : nullptr;
    void* kept = sizes.kept > 0 && !finds ? own + result.numel() - sizes.kept : nullptr;
    const Tensor workspace = bytes(sizes.forward_workspace, embeddings);
    of.engine.add(task, stage, state.data_ptr(), extremes, kept, workspace.data_ptr(),
                  c10::cuda::getCurrentCUDAStream());
    return {state, result};
}

// [4, N]: the rows' parts 0 and 1 and their counts; and what backward needs of the rows.
std::tuple<Tensor, Tensor> finish(const Tensor& state, const Tensor& pairs, c10::string_view formula,
                                  at::ArrayRef<double> params, bool mining, c10::string_view reduction) {
    check_pair_counts(pairs);
    const c10::cuda::CUDAGuard guard(pairs.device());
    const int64_t rows = pairs.size(1);
    const bool wide = state.scalar_type() == at::kDouble;
    check_state(state, rows, wide ? at::kDouble : at::kFloat, pairs.device(), "state");
    RowTask of(formula, params, mining, 0.0, wide, rows);
    of.task.problem.reduction = parse_reduction(reduction);
    const Tensor counts = pairs.contiguous();
    Tensor losses = at::empty({4, rows}, state.options());
    Tensor weights = at::empty(state.sizes(), state.options());
    const Tensor flags = bytes(rows, state);
    of.engine->finish(of.task, state.const_data_ptr(), counts.const_data_ptr<int64_t>(), losses.data_ptr(),
                      weights.data_ptr(), flags.data_ptr(), c10::cuda::getCurrentCUDAStream());
    return {losses, weights};
}

// grad_parts [2, N]: the gradient by each row's parts. The results are in the type computed in.
std::tuple<Tensor, Tensor> block_backward_op(const Tensor& grad_parts, const Tensor& weights,
                                             const Tensor& kept, const Tensor& embeddings,
                                             const Tensor& labels, const Tensor& block,
                                             const Tensor& block_labels, const OptionalTensor& self_index,
                                             c10::string_view formula, at::ArrayRef<double> params,
                                             c10::string_view similarity, bool need_emb, bool need_block) {
    const c10::cuda::CUDAGuard guard(embeddings.device());
    const BlockInputs of(embeddings, labels, block, block_labels, self_index, formula, params, std::nullopt,
                         similarity, "sum");
    const int64_t rows = embeddings.size(0);
    TORCH_CHECK_VALUE(grad_parts.dim() == 2 && grad_parts.size(0) == 2 && grad_parts.size(1) == rows &&
                          grad_parts.scalar_type() == of.type && grad_parts.device() == embeddings.device(),
                      "grad_parts: expected ", of.type, " of shape [2, ", rows, "], got ",
                      grad_parts.scalar_type(), " ", grad_parts.sizes());
    const Task task = of.task(check_state(weights, rows, of.type, embeddings.device(), "weights"));
    const BlockSizes sizes = of.engine.sizes(task);
    TORCH_CHECK_VALUE(kept.numel() == sizes.kept && kept.is_contiguous() && kept.scalar_type() == at::kByte &&
                          kept.device() == embeddings.device(),
                      "kept: expected the ", sizes.kept, " bytes of pair_block, got ", kept.scalar_type(),
                      " ", kept.sizes());
    const auto gradient = [&](bool wanted, const Tensor& like) {
        const auto options = embeddings.options().dtype(of.type);
        if (!wanted) return at::empty({0}, options);
        return of.empty() ? at::zeros(like.sizes(), options) : at::empty(like.sizes(), options);
    };
    Tensor grad_emb = gradient(need_emb, embeddings), grad_block = gradient(need_block, block);
    if (of.empty() || embeddings.size(1) == 0 || !(need_emb || need_block)) return {grad_emb, grad_block};
    const Tensor above = grad_parts.contiguous();
    const Tensor workspace = bytes(sizes.backward_workspace, embeddings);
    const auto data_or_null = [](bool wanted, const Tensor& x) { return wanted ? x.data_ptr() : nullptr; };
    of.engine.backward(task, weights.const_data_ptr(), above.const_data_ptr(),
                       sizes.kept > 0 ? kept.const_data_ptr() : nullptr, data_or_null(need_emb, grad_emb),
                       data_or_null(need_block, grad_block), workspace.data_ptr(),
                       c10::cuda::getCurrentCUDAStream());
    return {grad_emb, grad_block};
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CUDA, m) {
    m.impl("pair_block_turn", &turn);
    m.impl("pair_block", &add);
    m.impl("pair_block_rows", &finish);
    m.impl("pair_block_backward", &block_backward_op);
}

}  // namespace dml::cuda
