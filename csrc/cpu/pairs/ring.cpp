// The engine one block of columns at a time, for a ring of processes (dml_cuda.distributed), of which none
// holds all columns. The rows' running numbers go from call to call in one tensor:
//
//   state [14, N], in the order of the embeddings: the seven numbers of RowAccumulators, the six of RowStats,
//   and whether the points so far were finite (0 or NaN)
//
// pair_block_turn makes it, and turns it from one stage to the next; pair_block adds a block to it in a stage
// ("hardest", "negatives", "positives" or "both", as stages() of a formula lists them); pair_block_rows makes
// the losses; pair_block_backward gives the gradient by the rows and by one block. Blocks are added in the
// order of the calls, so the caller's order is that of every sum.
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
void each_row(int64_t n, const Visit& visit) {
    for_pieces(n, kRowPiece, n * 8, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) visit(i);
    });
}

// The rows' numbers of a state.
template <typename T>
struct State {
    Tensor numbers;  // [14, N]
    int64_t n;

    explicit State(Tensor of) : numbers(std::move(of)), n(numbers.size(1)) {}
    T* row(int64_t k) const { return numbers.data_ptr<T>() + k * n; }
    T* finite() const { return row(kRingState - 1); }

    // RowAccumulators from it, and back, for rows in the order of a plan or (null) as they are.
    void read(RowAccumulators<T>& accumulators, const int32_t* order) const {
        each_row(n, [&](int64_t i) {
            for (int64_t k = 0; k < kAccumulatorNumbers; ++k)
                accumulators.numbers[k * n + i] = row(k)[order ? order[i] : i];
        });
    }
    void write(const RowAccumulators<T>& accumulators, const int32_t* order) const {
        each_row(n, [&](int64_t i) {
            for (int64_t k = 0; k < kAccumulatorNumbers; ++k)
                row(k)[order ? order[i] : i] = accumulators.numbers[k * n + i];
        });
    }
};

// A block of columns, prepared with memory of its own.
template <typename T>
struct Block {
    const Problem problem;
    const References refs;
    const Layout<int64_t> layout;
    const Tensor memory;
    Batch<T> batch;

    // once: as Batch has it.
    Block(const Call& call, bool once)
        : problem(describe(call)),
          refs(call),
          layout(call.embeddings.size(0), call.ref_emb->size(0), false, sizeof(T), false),
          memory(prepare(call)),
          batch(call, refs, problem, layout, memory.data_ptr<uint8_t>(), once) {}

    bool finite() const { return batch.rows.finite && batch.cols.finite; }
    Tensor kept() const { return memory.narrow(0, layout.kept, batch.tiles.count()); }

   private:
    Tensor prepare(const Call& call) const {
        Tensor bytes = at::zeros({layout.bytes}, call.embeddings.options().dtype(at::kByte));
        const Tensor rows = call.labels.contiguous(), cols = call.ref_labels->contiguous();
        make_plan(rows.const_data_ptr<int64_t>(), rows.size(0), cols.const_data_ptr<int64_t>(), cols.size(0),
                  false, reinterpret_cast<int32_t*>(bytes.data_ptr<uint8_t>() + layout.plan));
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

// run(T()) in the type that is computed in.
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
        check_state(*before, kRingState, n, type, "state");
    }
    const Tensor counts = pairs.contiguous();
    const int64_t* count = counts.const_data_ptr<int64_t>();
    return in_compute_type(type, [&](auto number) {
        using T = decltype(number);
        const TileKernels<T>& kernels = tile_kernels<T>(problem.formula);
        RowAccumulators<T> accumulators(n, kernels.neg, kernels.pos);
        if (stage == "start") {
            const State<T> state(at::zeros({kRingState, n}, pairs.options().dtype(type)));
            state.write(accumulators, nullptr);
            each_row(n, [&](int64_t i) {
                const bool active = can_have_loss(kernels, mining.on, count[i], count[n + i]);
                const Bounds<T> bounds = active ? Bounds<T>::all() : Bounds<T>::none();
                state.row(kNegAbove)[i] = bounds.neg_above;
                state.row(kPosBelow)[i] = bounds.pos_below;
            });
            return state.numbers;
        }
        const State<T> state(before->clone(at::MemoryFormat::Contiguous));
        state.read(accumulators, nullptr);
        T *above = state.row(kNegAbove), *below = state.row(kPosBelow);
        each_row(n, [&](int64_t i) {
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

// The state with a block in it, and per tile whether some pair of it may have a gradient, as found before or
// now.
std::tuple<Tensor, Tensor> add_block(const Call& call, const Tensor& before, c10::string_view stage,
                                     const OptionalTensor& found) {
    check_block(call);
    const Tensor& embeddings = call.embeddings;
    const at::ScalarType type = compute_type(embeddings);
    check_stage(stage, call.epsilon);
    check_state(before, kRingState, embeddings.size(0), type, "state");
    return in_compute_type(type, [&](auto number) -> std::tuple<Tensor, Tensor> {
        using T = decltype(number);
        const State<T> state(before.clone(at::MemoryFormat::Contiguous));
        const auto kept = [&](const Tensor& now) {
            return found ? at::bitwise_or(now, *found) : now.clone();
        };
        Block<T> here(call, false);  // all points are looked at, so whether they are finite is known
        Batch<T>& batch = here.batch;
        const int32_t* order = batch.plan.row_order;
        if (!here.finite()) {
            std::fill_n(state.finite(), state.n, std::numeric_limits<T>::quiet_NaN());
            return {state.numbers, kept(here.kept())};
        }
        Forward<T> pass(batch, here.problem);
        state.read(pass.accumulators(), order);
        each_row(state.n, [&](int64_t i) {
            batch.stats.neg_above[i] = state.row(kNegAbove)[order[i]];
            batch.stats.pos_below[i] = state.row(kPosBelow)[order[i]];
            batch.stats.neg_value[i] = state.row(kNegValue)[order[i]];
        });
        if (stage == "hardest") {
            pass.hardest_positives();
        } else {
            pass.add(stage == "both"        ? Kinds::kBoth
                     : stage == "negatives" ? Kinds::kNegatives
                                            : Kinds::kPositives);
        }
        state.write(pass.accumulators(), order);
        return {state.numbers, kept(here.kept())};
    });
}

// [4, N]: the rows' parts 0 and 1 and their counts; and what backward needs of the rows [6, N], the
// derivatives of each part still without what comes from above.
std::tuple<Tensor, Tensor> finish_rows(const PairOptions& options, const Tensor& before,
                                       const Tensor& pairs) {
    const Problem problem = describe(options);
    check_pair_counts(pairs);
    const int64_t n = pairs.size(1);
    check_state(before, kRingState, n, before.scalar_type() == at::kDouble ? at::kDouble : at::kFloat,
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
        each_row(n, [&](int64_t i) {
            const FinishedRow<T> row(kernels, problem.params, problem.mining.on, problem.reduction,
                                     accumulators, i, count[i], count[n + i], !std::isnan(state.finite()[i]));
            for (int k = 0; k < 2; ++k) {
                loss[k * n + i] = row.loss.part[k];
                loss[(2 + k) * n + i] = row.count[k];
            }
            weight[2 * n + i] = row.neg_value;
            weight[3 * n + i] = row.pos_value;
            weight[4 * n + i] = row.loss.d_neg;
            weight[5 * n + i] = row.loss.d_pos;
        });
        return {losses, weights};
    });
}

// grad_parts [2, N]: the gradient by each row's parts. The results are in the type computed in.
std::tuple<Tensor, Tensor> block_backward(const Call& call, const Tensor& grad_parts, const Tensor& weights,
                                          const Tensor& kept, bool need_emb, bool need_ref) {
    check_block(call);
    const Tensor& embeddings = call.embeddings;
    const int64_t n = embeddings.size(0);
    const at::ScalarType type = compute_type(embeddings);
    check_state(grad_parts, 2, n, type, "grad_parts");
    check_state(weights, kStatsPerRow, n, type, "weights");
    return in_compute_type(type, [&](auto number) -> std::tuple<Tensor, Tensor> {
        using T = decltype(number);
        Block<T> here(call, true);
        Batch<T>& batch = here.batch;
        TORCH_CHECK_VALUE(kept.scalar_type() == at::kByte && kept.numel() == batch.tiles.count(),
                          "kept: expected the ", batch.tiles.count(), " bytes of pair_block, got ",
                          kept.scalar_type(), " ", kept.sizes());
        here.kept().copy_(kept);
        const Tensor above = grad_parts.contiguous(), stats = weights.contiguous();
        const int last = batch.kernels.parts - 1;
        std::vector<T> sorted(kStatsPerRow * n);
        each_row(n, [&](int64_t i) {
            const int64_t row = batch.plan.row_order[i];
            for (int64_t k = 0; k < kStatsPerRow; ++k) {
                const T* up = k < 4 ? nullptr : above.const_data_ptr<T>() + (k == 4 ? last * n : 0);
                const T from = stats.const_data_ptr<T>()[k * n + row];
                sorted[k * n + i] = up ? up[row] * from : from;
            }
        });
        const T* s = sorted.data();
        const auto like = [&](bool wanted, const Tensor& of) {
            return wanted ? at::zeros(of.sizes(), of.options().dtype(type)) : Tensor();
        };
        const Tensor grad_emb = like(need_emb, embeddings), grad_ref = like(need_ref, *call.ref_emb);
        if (batch.tiles.count() > 0 && (need_emb || need_ref)) {
            const RowWeights<T> rows = {s, s + n, s + 2 * n, s + 3 * n, s + 4 * n, s + 5 * n};
            BackwardPass<T>(batch, rows, grad_emb, grad_ref).run();
        }
        const Tensor none = at::empty({0}, embeddings.options().dtype(type));
        return {need_emb ? grad_emb : none, need_ref ? grad_ref : none};
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
