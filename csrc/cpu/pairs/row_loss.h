// The loss of a row from its complete accumulators, and the sums of such losses.
#pragma once

#include <limits>

#include "core/problem.h"
#include "cpu/pairs/layout.h"
#include "cpu/pairs/row_accumulators.h"

namespace dml::cpu {

template <typename T>
struct RowOutcome {
    RowDerivatives<T> loss;
    Gathered<T> gathered;
    T count[2];
    bool poisoned;  // the loss is NaN, because a point is not finite

    // positives, negatives: how many pairs the row has, kept or not.
    RowOutcome(const TileKernels<T>& formula, const double* params, bool mining, Reduction reduction,
               const RowAccumulators<T>& accumulators, int64_t i, int64_t positives, int64_t negatives,
               bool finite) {
        // 1. The loss.
        gathered.neg = accumulators.neg_value(formula, i);
        gathered.pos = accumulators.pos_value(formula, i);
        if (formula.neg == Accumulator::kSum) gathered.neg_count = accumulators.neg_a[i];
        if (formula.pos == Accumulator::kSum) gathered.pos_count = accumulators.pos_a[i];
        loss = formula.row(params, gathered, accumulators.pos_context[i]);
        poisoned = !finite && row_has_loss(formula.needed, mining, positives > 0, negatives > 0);
        if (poisoned) {
            loss.part[0] = std::numeric_limits<T>::quiet_NaN();
            loss.nonzero[0] = true;
        }

        // 2. What a mean divides by.
        const bool kept_pos = formula.pos == Accumulator::kSum ? accumulators.pos_a[i] > T(0)
                                                               : accumulators.pos_a[i] > -infinity<T>();
        const bool any_kept =
            mining ? kept_pos || accumulators.max_neg[i] > -infinity<T>() : positives > 0 || negatives > 0;
        const bool has_loss =
            mining ? any_kept : row_has_loss(formula.needed, false, positives > 0, negatives > 0);
        for (int k = 0; k < 2; ++k) {
            count[k] = loss.count[k];
            if (formula.count == Count::kPairs) continue;
            if (formula.count == Count::kRowsWithLoss) count[k] = has_loss;
            if (reduction == Reduction::kMeanNonzero) count[k] = loss.nonzero[k];
            if (reduction == Reduction::kMeanValid && formula.count == Count::kRows && formula.parts == 1)
                count[k] = any_kept;
        }
    }

    // What backward needs of row i; its bounds are there already.
    void store(const RowStats<T>& stats, int64_t i) const {
        stats.neg_value[i] = gathered.neg;
        stats.pos_value[i] = gathered.pos;
        stats.neg_count[i] = gathered.neg_count;
        stats.pos_count[i] = gathered.pos_count;
        stats.d_neg[i] = loss.d_neg;
        stats.d_pos[i] = loss.d_pos;
    }
};

// Sums over rows.
struct Total {
    double part[2] = {0, 0}, count[2] = {0, 0};
    bool poisoned = false;

    template <typename T>
    void add(const RowOutcome<T>& row, T weight) {
        for (int k = 0; k < 2; ++k) {
            part[k] += weight * row.loss.part[k];
            count[k] += row.count[k];
        }
        poisoned = poisoned || row.poisoned;
    }
    void add(const Total& total) {
        for (int k = 0; k < 2; ++k) {
            part[k] += total.part[k];
            count[k] += total.count[k];
        }
        poisoned = poisoned || total.poisoned;
    }
};

}  // namespace dml::cpu
