// Row kernels before, between and after the passes over blocks of columns.
#include "cuda/ring/ring.cuh"

namespace dml::cuda {
namespace {

// f(a number of the accumulating type).
template <typename F>
void with_number(const Task& task, const F& f) {
    if (task.problem.scalar == Scalar::kFloat64) {
        f(double());
    } else {
        f(float());
    }
}

// The values of empty accumulators.
struct Empty {
    bool neg_exp, pos_exp, plus_one;
};
Empty empty_accumulators(FormulaId formula) {
    Empty empty = {};
    with_formula(formula, [&](auto tag) {
        using Formula = typename decltype(tag)::template Of<float>;
        empty = {Formula::kNeg == Accumulator::kLogSumExp, Formula::kPos == Accumulator::kLogSumExp,
                 Formula::kPlusOne};
    });
    return empty;
}

template <typename Acc>
__global__ void __launch_bounds__(kRowThreads)
    turn_rows_of(BlockStage stage, bool mining, Empty empty, Acc epsilon, int64_t rows,
                 RowStats<Acc> row_stats) {
    const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
    const auto set_bounds = [&](const Bounds<Acc>& bounds) {
        row_stats.neg_above[i] = bounds.neg_above;
        row_stats.pos_below[i] = bounds.pos_below;
    };
    if (stage == BlockStage::kStart) {
        if (i < kHeader) row_stats.header[i] = Acc(1);
        if (i >= rows) return;
        if (mining) {
            const Extremes<Acc> none;
            const RunningRow<Acc> row{row_stats, i};
            row.min_pos() = none.min_pos;
            row.max_neg() = none.max_neg;
        } else {
            set_bounds(Bounds<Acc>::all());
        }
        row_stats.neg[i] = empty.neg_exp ? -infinity<Acc>() : Acc(0);
        row_stats.pos[i] = empty.pos_exp ? -infinity<Acc>() : Acc(0);
        row_stats.d_neg[i] = row_stats.d_pos[i] = Acc(0);
        return;
    }
    if (i >= rows) return;
    if (stage == BlockStage::kHardest) {
        const RunningRow<Acc> row{row_stats, i};
        set_bounds(Extremes<Acc>{row.min_pos(), row.max_neg()}.mined(epsilon));
    }
    if (stage == BlockStage::kNegatives) {  // from here on neg is the context, d_neg its derivatives' sum
        if (empty.neg_exp)
            row_stats.neg[i] = LogSumExp<Acc>{row_stats.neg[i], row_stats.d_neg[i]}.value(empty.plus_one);
        if (!empty.neg_exp) row_stats.neg[i] = row_stats.d_neg[i];
        row_stats.d_neg[i] = Acc(0);
    }
}

template <typename Acc>
__global__ void __launch_bounds__(kRowThreads)
    finish_rows_of(const __grid_constant__ AnyFormula<Acc> any_formula, bool mining, Reduction reduction,
                   int64_t rows, RowStats<Acc> from, const int64_t* pairs, Acc* losses, RowStats<Acc> to,
                   RowsByParams<Acc> by_params) {
    wait_for_previous_kernel();
    const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
    if (i < kHeader) to.header[i] = from.header[i];
    if (i >= rows) return;
    const int64_t positives = pairs[i], negatives = pairs[rows + i];
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        const Gathering<Formula, Acc> gathered = RunningRow<Acc>{from, i}.template load<Formula>();
        const Bounds<Acc> bounds = {from.pos_below[i], from.neg_above[i]};
        const bool both = positives > 0 && negatives > 0;
        const RowResult<Acc> result =
            finish_row(to, i, formula, gathered, bounds, mining, both, Acc(1),
                       Results<Acc>{nullptr, 0, nullptr, reduction, nullptr, by_params});
        // An input that is not finite reaches only rows to which the labels give the pairs that a loss needs.
        const bool poisoned = row_has_loss(Formula::needed_pairs(), mining, positives > 0, negatives > 0) &&
                              !is_finite(from.header[kHealth]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            losses[k * rows + i] = poisoned && k < Formula::kParts ? not_a_number<Acc>() : result.part[k];
            losses[(2 + k) * rows + i] = result.count[k];
        }
    });
}

}  // namespace

void turn_rows(const Task& task, BlockStage stage, void* state, cudaStream_t stream) {
    const Problem& p = task.problem;
    if (stage != BlockStage::kStart) check_stage(p, stage);
    with_number(task, [&](auto number) {
        using Acc = decltype(number);
        const int64_t rows = p.queries.count;
        launch(turn_rows_of<Acc>, row_blocks(std::max<int64_t>(rows, 1)), dim3(kRowThreads), 0, stream, stage,
               p.mining.on, empty_accumulators(p.formula), Acc(p.mining.epsilon), rows,
               state_of(static_cast<Acc*>(state), rows));
    });
}

void finish_rows(const Task& asked, const void* state, const int64_t* pairs, void* losses, void* weights,
                 void* workspace, cudaStream_t stream) {
    const Problem& p = asked.problem;
    with_number(asked, [&](auto number) {
        using Acc = decltype(number);
        const int64_t rows = p.queries.count;
        auto* bytes = static_cast<unsigned char*>(workspace);
        Launches launches(stream);
        const Task task = with_made_formula<Acc>(asked, bytes, launches);
        RowStats<Acc> to = state_of(static_cast<Acc*>(weights), rows);
        to.flags = bytes;
        RowsByParams<Acc> by_params = {};
        if (task.learned.count > 0)
            by_params = {task.learned.made, static_cast<Acc*>(weights) + state_numbers(rows), rows};
        launches(finish_rows_of<Acc>, row_blocks(std::max<int64_t>(rows, 1)), dim3(kRowThreads), 0,
                 AnyFormula<Acc>(p, task.learned.made), p.mining.on, p.reduction, rows,
                 state_of(const_cast<Acc*>(static_cast<const Acc*>(state)), rows), pairs,
                 static_cast<Acc*>(losses), to, by_params);
    });
}

}  // namespace dml::cuda
