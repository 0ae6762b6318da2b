// The ops on blocks of columns (torch/ops.cpp lists them) for CUDA tensors: they allocate what the engine of
// cuda/ring/ring.h asks for and call it, on the current stream of the inputs' device, without host
// synchronisation.
#include <ATen/TensorOperators.h>
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

// A state, or the weights that are made of it.
void check_state(const Tensor& state, int64_t numbers, at::ScalarType type, c10::Device device,
                 const char* name) {
    TORCH_CHECK_VALUE(state.dim() == 1 && state.numel() == numbers && state.is_contiguous() &&
                          state.scalar_type() == type && state.device() == device,
                      name, ": expected ", type, " of shape [", numbers, "] on ", device, ", got ",
                      state.scalar_type(), " ", state.sizes(), " on ", state.device());
}

// A task of rows without their points.
struct RowTask {
    Task task;
    OptionalTensor params;  // that learn
    const BlockEntryPoints* engine;

    RowTask(const PairOptions& options, bool is_double, int64_t rows, c10::Device device) {
        Problem& p = task.problem;
        p = describe(options, device);
        params = set_learned(task, options, device);
        engine = engine_of(p, options.formula)->blocks;
        p.scalar = is_double ? Scalar::kFloat64 : Scalar::kFloat32;
        p.queries.count = rows;
    }
};

Tensor turn(const PairOptions& options, const OptionalTensor& before, const Tensor& pairs,
            c10::string_view stage_name, bool is_double) {
    check_pair_counts(pairs);
    const c10::cuda::CUDAGuard guard(pairs.device());
    const int64_t rows = pairs.size(1);
    const at::ScalarType type = is_double ? at::kDouble : at::kFloat;
    const RowTask of_rows(options, is_double, rows, pairs.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (stage_name == "start") {
        Tensor state = at::empty({state_numbers(rows)}, pairs.options().dtype(type));
        of_rows.engine->turn(of_rows.task, BlockStage::kStart, state.data_ptr(), stream);
        return state;
    }
    const BlockStage stage = parse_stage(stage_name, options.epsilon);
    TORCH_CHECK_VALUE(before, "state: expected one in every stage but \"start\"");
    check_state(*before, state_numbers(rows), type, pairs.device(), "state");
    Tensor state = before->clone();
    of_rows.engine->turn(of_rows.task, stage, state.data_ptr(), stream);
    return state;
}

// A block's points as the engine sees them.
struct BlockInputs {
    Inputs in;
    Task& task = in.task;
    const BlockEntryPoints& engine = *in.engine->blocks;
    const at::ScalarType type;  // that is computed in

    explicit BlockInputs(const Call& c)
        : in((check_block(c), c)),
          type(c.embeddings.scalar_type() == at::kDouble ? at::kDouble : at::kFloat) {}

    bool empty() const { return task.problem.queries.count == 0 || task.problem.refs.count == 0; }
};

// found: what the stages before have found in this block, or none. As a stage returns it: "hardest" the
// tiles' extremes, the others their kept flags, "negatives" behind the extremes that it was given.
std::tuple<Tensor, Tensor> add(const Call& call, const Tensor& before, c10::string_view stage_name,
                               const OptionalTensor& found) {
    const Tensor& embeddings = call.embeddings;
    const c10::cuda::CUDAGuard guard(embeddings.device());
    const BlockInputs block(call);
    const BlockStage stage = parse_stage(stage_name, call.epsilon);
    check_state(before, state_numbers(embeddings.size(0)), block.type, embeddings.device(), "state");
    const BlockSizes sizes = block.engine.sizes(block.task);

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
    if (block.empty()) return {state, result};
    auto* made = static_cast<uint8_t*>(result.data_ptr());
    const bool finds = stage == BlockStage::kHardest;
    void* extremes = given > 0 ? found->data_ptr() : finds && sizes.extremes > 0 ? made : nullptr;
    void* kept = sizes.kept > 0 && !finds ? made + result.numel() - sizes.kept : nullptr;
    const Tensor workspace = bytes(sizes.forward_workspace, embeddings);
    block.engine.add(block.task, stage, state.data_ptr(), extremes, kept, workspace.data_ptr(),
                     c10::cuda::getCurrentCUDAStream());
    return {state, result};
}

// [4, N]: the rows' parts 0 and 1 and their counts; and what backward needs of the rows.
std::tuple<Tensor, Tensor> finish(const PairOptions& options, const Tensor& state, const Tensor& pairs) {
    check_pair_counts(pairs);
    const c10::cuda::CUDAGuard guard(pairs.device());
    const int64_t rows = pairs.size(1);
    const bool is_double = state.scalar_type() == at::kDouble;
    check_state(state, state_numbers(rows), is_double ? at::kDouble : at::kFloat, pairs.device(), "state");
    const RowTask of_rows(options, is_double, rows, pairs.device());
    const Tensor counts = pairs.contiguous();
    Tensor losses = at::empty({4, rows}, state.options());
    Tensor weights = at::empty({weight_numbers(of_rows.task)}, state.options());
    const Tensor workspace = bytes(finish_bytes(of_rows.task), state);
    of_rows.engine->finish(of_rows.task, state.const_data_ptr(), counts.const_data_ptr<int64_t>(),
                           losses.data_ptr(), weights.data_ptr(), workspace.data_ptr(),
                           c10::cuda::getCurrentCUDAStream());
    return {losses, weights};
}

// grad_parts [2, N]: the gradient by each row's parts. The results are in the type computed in.
BlockGradients backward_of_block(const Call& call, const Tensor& grad_parts, const Tensor& weights,
                                 const Tensor& kept, bool need_emb, bool need_ref, bool need_params,
                                 bool by_rows) {
    const Tensor& embeddings = call.embeddings;
    TORCH_CHECK_VALUE(!need_params || has_device_params(call, embeddings.device()),
                      "need_params: expected dynamic_params on the device of the embeddings");
    const c10::cuda::CUDAGuard guard(embeddings.device());
    BlockInputs block(call);
    const int64_t rows = embeddings.size(0);
    TORCH_CHECK_VALUE(grad_parts.dim() == 2 && grad_parts.size(0) == 2 && grad_parts.size(1) == rows &&
                          grad_parts.scalar_type() == block.type &&
                          grad_parts.device() == embeddings.device(),
                      "grad_parts: expected ", block.type, " of shape [2, ", rows, "], got ",
                      grad_parts.scalar_type(), " ", grad_parts.sizes());
    check_state(weights, weight_numbers(block.task), block.type, embeddings.device(), "weights");
    const BlockSizes sizes = block.engine.sizes(block.task);
    TORCH_CHECK_VALUE(kept.numel() == sizes.kept && kept.is_contiguous() && kept.scalar_type() == at::kByte &&
                          kept.device() == embeddings.device(),
                      "kept: expected the ", sizes.kept, " bytes of pair_block, got ", kept.scalar_type(),
                      " ", kept.sizes());
    const auto gradient = [&](bool wanted, const Tensor& like) {
        const auto options = embeddings.options().dtype(block.type);
        if (!wanted) return at::empty({0}, options);
        return block.empty() ? at::zeros(like.sizes(), options) : at::empty(like.sizes(), options);
    };
    Tensor grad_emb = gradient(need_emb, embeddings), grad_ref = gradient(need_ref, *call.ref_emb);
    Tensor grad_params = at::empty({0}, at::kDouble);
    if (need_params) {
        grad_params = at::zeros({block.task.learned.count + 1}, block.in.params->options());
        block.task.learned.gradient = grad_params.mutable_data_ptr<double>();
    }
    // What parameters do to the rows' losses for constant terms.
    const auto add_rows = [&] {
        if (!need_params || !by_rows) return;
        const int64_t count = block.task.learned.count;
        const Tensor parts = weights.narrow(0, state_numbers(rows), 2 * count * rows).view({count, 2, rows});
        grad_params.narrow(0, 0, count).add_((parts * grad_parts).sum({1, 2}, false, at::kDouble));
    };
    if (block.empty() || embeddings.size(1) == 0 || !(need_emb || need_ref || need_params)) {
        add_rows();
        return {grad_emb, grad_ref, grad_params};
    }
    const Tensor upstream = grad_parts.contiguous();
    const Tensor workspace = bytes(sizes.backward_workspace, embeddings);
    const auto data_or_null = [](bool wanted, const Tensor& x) { return wanted ? x.data_ptr() : nullptr; };
    block.engine.backward(block.task, weights.const_data_ptr(), upstream.const_data_ptr(),
                          sizes.kept > 0 ? kept.const_data_ptr() : nullptr, data_or_null(need_emb, grad_emb),
                          data_or_null(need_ref, grad_ref), workspace.data_ptr(),
                          c10::cuda::getCurrentCUDAStream());
    add_rows();
    return {grad_emb, grad_ref, grad_params};
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CUDA, m) {
    m.impl("pair_block_turn", &FlatOp<&turn>::call);
    m.impl("pair_block", &FlatOp<&add>::call);
    m.impl("pair_block_rows", &FlatOp<&finish>::call);
    m.impl("pair_block_backward", &FlatOp<&backward_of_block>::call);
}

}  // namespace dml::cuda
