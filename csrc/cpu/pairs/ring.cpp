// Pair losses with columns that come block by block: a ring of processes (dml_cuda.distributed) never holds
// all of them. One tensor carries the rows' running numbers from call to call:
//
//   state [16, N], in the order of the embeddings: the seven numbers of RowAccumulators, the eight of
//   RowStats, and whether all points so far were finite (0 or NaN)
//
//   pair_block_turn      makes the state, and prepares it for the next stage
//   pair_block           adds a block in one of the formula's stages(): "hardest", "negatives", "positives"
//                        or "both"
//   pair_block_rows      makes the losses
//   pair_block_backward  gives the gradients of the rows, of one block and of the parameters
//
// Blocks are added in the order of the calls: the caller determines the order of every sum.
#include "cpu/pairs/ring.h"

#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/pairs/pair_loss.h"
#include "torch/ring_ops.h"

namespace dml::cpu {

std::vector<std::string> stages(const std::string& formula_name, bool mining) {
    const FormulaInfo* formula = formula_named(formula_name);
    TORCH_CHECK_VALUE(formula, "formula: unknown \"", formula_name, "\"");
    if (mining) return {"hardest", "negatives", "positives"};
    if (tile_kernels<double>(formula->id).context) return {"negatives", "positives"};
    return {"both"};
}

namespace {

constexpr int64_t kNegAbove = kAccumulatorNumbers, kPosBelow = kNegAbove + 1, kNegValue = kNegAbove + 2;

template <typename Visit>
void for_rows(int64_t n, const Visit& visit) {
    for_pieces(n, kRowPiece, n * 8, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) visit(i);
    });
}

// The state as arrays of rows.
template <typename T>
struct State {
    Tensor numbers;  // [16, N]
    int64_t n;

    explicit State(Tensor numbers_of_rows) : numbers(std::move(numbers_of_rows)), n(numbers.size(1)) {}
    T* row(int64_t k) const { return numbers.data_ptr<T>() + k * n; }
    T* finite() const { return row(kStateNumbers - 1); }

    // Copies to and from RowAccumulators, whose rows are in the given order (null: that of the embeddings).
    void read(RowAccumulators<T>& accumulators, const int32_t* order) const {
        for_rows(n, [&](int64_t i) {
            for (int64_t k = 0; k < kAccumulatorNumbers; ++k)
                accumulators.numbers[k * n + i] = row(k)[order ? order[i] : i];
        });
    }
    void write(const RowAccumulators<T>& accumulators, const int32_t* order) const {
        for_rows(n, [&](int64_t i) {
            for (int64_t k = 0; k < kAccumulatorNumbers; ++k)
                row(k)[order ? order[i] : i] = accumulators.numbers[k * n + i];
        });
    }
};

// A prepared block of columns, and the memory of its plan and stats.
template <typename T>
struct Block {
    const Problem problem;
    const References refs;
    const Layout<int64_t> layout;
    const Tensor memory;
    Batch<T> batch;

    // once: see Batch.
    Block(const Call& call, bool once)
        : problem(describe(call)),
          refs(call),
          layout({call.embeddings.size(0), call.ref_emb->size(0), false, false}, sizeof(T), false),
          memory(prepare(call)),
          batch(call, refs, problem, layout, memory.data_ptr<uint8_t>(), once) {}

    bool finite() const { return batch.rows.finite && batch.cols.finite; }
    Tensor kept() const { return memory.narrow(0, layout.kept, batch.tiles.count()); }

   private:
    Tensor prepare(const Call& call) const {
        Tensor bytes = at::zeros({layout.bytes}, call.embeddings.options().dtype(at::kByte));
        const Tensor rows = call.labels.contiguous(), cols = call.ref_labels->contiguous();
        make_plan(rows.const_data_ptr<int64_t>(), rows.size(0), cols.const_data_ptr<int64_t>(), cols.size(0),
                  false, false, reinterpret_cast<int32_t*>(bytes.data_ptr<uint8_t>() + layout.plan));
        return bytes;
    }
};

void check_state(const Tensor& state, int64_t numbers, int64_t n, at::ScalarType type, const char* name) {
    TORCH_CHECK_VALUE(state.dim() == 2 && state.size(0) == numbers && state.size(1) == n &&
                          state.scalar_type() == type && state.device().is_cpu(),
                      name, ": expected ", type, " of shape [", numbers, ", ", n, "], got ",
                      state.scalar_type(), " ", state.sizes());
}

at::ScalarType compute_type(const Tensor& embeddings) {
    return embeddings.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// run(T()) for the compute type.
template <typename Run>
auto in_compute_type(at::ScalarType type, const Run& run) {
    return type == at::kDouble ? run(double()) : run(float());
}

void check_stage(c10::string_view stage, std::optional<double> epsilon) {
    for (const char* known : {"hardest", "negatives", "positives", "both"}) {
        if (stage != known) continue;
        TORCH_CHECK_VALUE(stage != "hardest" || epsilon, "epsilon: expected a number in stage \"hardest\"");
        return;
    }
    TORCH_CHECK_VALUE(false, "stage: unknown \"", stage, "\"");
}

// pairs [2, N] int64: how many positives and negatives each row has among all columns.
Tensor turn(const PairOptions& options, const OptionalTensor& before, const Tensor& pairs,
            c10::string_view stage, bool is_double) {
    const Problem problem = describe(options);
    const Mining mining = problem.mining;
    check_pair_counts(pairs);
    const int64_t n = pairs.size(1);
    const at::ScalarType type = is_double ? at::kDouble : at::kFloat;
    if (stage != "start") {
        check_stage(stage, options.epsilon);
        TORCH_CHECK_VALUE(before, "state: expected one in every stage but \"start\"");
        check_state(*before, kStateNumbers, n, type, "state");
    }
    const Tensor counts = pairs.contiguous();
    const int64_t* count = counts.const_data_ptr<int64_t>();
    return in_compute_type(type, [&](auto number) {
        using T = decltype(number);
        const TileKernels<T>& kernels = tile_kernels<T>(problem.formula);
        RowAccumulators<T> accumulators(n, kernels.neg, kernels.pos);
        if (stage == "start") {
            const State<T> state(at::zeros({kStateNumbers, n}, pairs.options().dtype(type)));
            state.write(accumulators, nullptr);
            for_rows(n, [&](int64_t i) {
                const bool active = row_has_loss(kernels.needed, mining.on, count[i] > 0, count[n + i] > 0);
                const Bounds<T> bounds = active ? Bounds<T>::all() : Bounds<T>::none();
                state.row(kNegAbove)[i] = bounds.neg_above;
                state.row(kPosBelow)[i] = bounds.pos_below;
            });
            return state.numbers;
        }
        const State<T> state(before->clone(at::MemoryFormat::Contiguous));
        state.read(accumulators, nullptr);
        T *above = state.row(kNegAbove), *below = state.row(kPosBelow);
        for_rows(n, [&](int64_t i) {
            if (stage == "hardest" && above[i] == -infinity<T>())
                above[i] = accumulators.min_pos[i] - T(mining.epsilon);
            if (stage != "negatives") return;
            if (mining.on) {
                const Bounds<T> bounds = close_bounds(kernels, accumulators, i, above[i], T(mining.epsilon));
                above[i] = bounds.neg_above;
                below[i] = bounds.pos_below;
            }
            if (kernels.context) state.row(kNegValue)[i] = accumulators.neg_value(kernels, i);
        });
        state.write(accumulators, nullptr);
        return state.numbers;
    });
}

// Returns the state with the block added, and for each tile whether a pair of it may have a gradient,
// combined with `found` of earlier stages.
std::tuple<Tensor, Tensor> add_block(const Call& call, const Tensor& before, c10::string_view stage,
                                     const OptionalTensor& found) {
    check_block(call);
    const Tensor& embeddings = call.embeddings;
    const at::ScalarType type = compute_type(embeddings);
    check_stage(stage, call.epsilon);
    check_state(before, kStateNumbers, embeddings.size(0), type, "state");
    return in_compute_type(type, [&](auto number) -> std::tuple<Tensor, Tensor> {
        using T = decltype(number);
        const State<T> state(before.clone(at::MemoryFormat::Contiguous));
        const auto kept = [&](const Tensor& now) {
            return found ? at::bitwise_or(now, *found) : now.clone();
        };
        Block<T> prepared(call, false);  // packs all points, which finds any that is not finite
        Batch<T>& batch = prepared.batch;
        const int32_t* order = batch.plan.row_order;
        if (!prepared.finite()) {
            std::fill_n(state.finite(), state.n, std::numeric_limits<T>::quiet_NaN());
            return {state.numbers, kept(prepared.kept())};
        }
        TilePasses<T> passes(batch, prepared.problem);
        state.read(passes.accumulators, order);
        for_rows(state.n, [&](int64_t i) {
            batch.row_stats.neg_above[i] = state.row(kNegAbove)[order[i]];
            batch.row_stats.pos_below[i] = state.row(kPosBelow)[order[i]];
            batch.row_stats.neg_value[i] = state.row(kNegValue)[order[i]];
        });
        const auto with_positives = [&](const TileAt& at) { return batch.holds_positives(at); };
        const auto with_negatives = [&](const TileAt& at) { return batch.holds_negatives(at); };
        if (stage == "hardest") {
            passes.find_hardest_positives(with_positives);
        } else if (stage == "positives") {
            passes.accumulate(with_positives, Kinds::kPositives);
        } else if (stage == "negatives") {
            passes.accumulate(with_negatives, Kinds::kNegatives);
        } else {
            passes.accumulate([](const TileAt&) { return true; }, Kinds::kBoth);
        }
        state.write(passes.accumulators, order);
        return {state.numbers, kept(prepared.kept())};
    });
}

// Returns [4, N], the rows' parts 0 and 1 and their counts; and [8, N], the row stats for backward, with
// derivatives that do not include the upstream gradient.
std::tuple<Tensor, Tensor> finish_rows(const PairOptions& options, const Tensor& before,
                                       const Tensor& pairs) {
    const Problem problem = describe(options);
    check_pair_counts(pairs);
    const int64_t n = pairs.size(1);
    check_state(before, kStateNumbers, n, before.scalar_type() == at::kDouble ? at::kDouble : at::kFloat,
                "state");
    const Tensor counts = pairs.contiguous();
    const int64_t* count = counts.const_data_ptr<int64_t>();
    return in_compute_type(before.scalar_type(), [&](auto number) -> std::tuple<Tensor, Tensor> {
        using T = decltype(number);
        const State<T> state(before.contiguous());
        const TileKernels<T>& kernels = tile_kernels<T>(problem.formula);
        RowAccumulators<T> accumulators(n, kernels.neg, kernels.pos);
        state.read(accumulators, nullptr);
        Tensor losses = at::empty({4, n}, before.options());
        Tensor weights = state.numbers.narrow(0, kAccumulatorNumbers, kStatsPerRow).clone();
        T *loss = losses.data_ptr<T>(), *weight = weights.data_ptr<T>();
        for_rows(n, [&](int64_t i) {
            const RowOutcome<T> row(kernels, problem.params, problem.mining.on, problem.reduction,
                                    accumulators, i, count[i], count[n + i], !std::isnan(state.finite()[i]));
            for (int k = 0; k < 2; ++k) {
                loss[k * n + i] = row.loss.part[k];
                loss[(2 + k) * n + i] = row.count[k];
            }
            row.store(RowStats<T>(weight, n), i);
        });
        return {losses, weights};
    });
}

// grad_parts [2, N]: the upstream gradients of the rows' parts. The results have the compute type; the
// gradient of the parameters is of the terms in this block, and of the rows' losses with by_rows.
BlockGradients block_backward(const Call& call, const Tensor& grad_parts, const Tensor& weights,
                              const Tensor& kept, bool need_emb, bool need_ref, bool need_params,
                              bool by_rows) {
    check_block(call);
    const Tensor& embeddings = call.embeddings;
    const int64_t n = embeddings.size(0);
    const at::ScalarType type = compute_type(embeddings);
    check_state(grad_parts, 2, n, type, "grad_parts");
    check_state(weights, kStatsPerRow, n, type, "weights");
    return in_compute_type(type, [&](auto number) -> BlockGradients {
        using T = decltype(number);
        Block<T> prepared(call, true);
        Batch<T>& batch = prepared.batch;
        TORCH_CHECK_VALUE(kept.scalar_type() == at::kByte && kept.numel() == batch.tiles.count(),
                          "kept: expected the ", batch.tiles.count(), " bytes of pair_block, got ",
                          kept.scalar_type(), " ", kept.sizes());
        prepared.kept().copy_(kept);
        const Tensor upstream = grad_parts.contiguous(), by_order = weights.contiguous();
        const T *up = upstream.const_data_ptr<T>(), *from = by_order.const_data_ptr<T>();
        for_rows(n, [&](int64_t i) {
            for (int64_t k = 0; k < kStatsPerRow; ++k)
                batch.row_stats.numbers()[k * n + i] = from[k * n + batch.plan.row_order[i]];
        });
        const Upstream<T> upstream_of{up, up + (batch.kernels.parts - 1) * n, true, 1, 1, nullptr};
        const auto like = [&](bool wanted, const Tensor& points) {
            return wanted ? at::zeros(points.sizes(), points.options().dtype(type)) : Tensor();
        };
        const Tensor grad_emb = like(need_emb, embeddings), grad_ref = like(need_ref, *call.ref_emb);
        ParamGradient grad_params(call, need_params);
        BackwardPass<T>(batch, upstream_of, grad_emb, grad_ref, grad_params.sums()).run(by_rows);
        const Tensor none = at::empty({0}, embeddings.options().dtype(type));
        return {need_emb ? grad_emb : none, need_ref ? grad_ref : none, grad_params.tensor()};
    });
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("pair_block_turn", &FlatOp<&turn>::call);
    m.impl("pair_block", &FlatOp<&add_block>::call);
    m.impl("pair_block_rows", &FlatOp<&finish_rows>::call);
    m.impl("pair_block_backward", &FlatOp<&block_backward>::call);
}

}  // namespace dml::cpu
