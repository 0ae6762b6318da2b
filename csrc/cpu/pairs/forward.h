// The forward pass. Rows and columns are sorted by label, so positives lie near the diagonal.
//
// With mining:
//   1. the tiles with positives: each row's smallest positive similarity, hence which negatives are kept;
//   2. the tiles with negatives: the accumulator of the kept negatives and their maximum, hence which
//      positives are kept;
//   3. the tiles with positives again: the accumulator of the kept positives.
//
// Without mining, one pass over every tile accumulates both kinds; formulas with kContext take steps 2 and 3.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

#include "cpu/pairs/batch.h"
#include "cpu/pairs/row_loss.h"
#include "cpu/pairs/tile_passes.h"

namespace dml::cpu {

template <typename T>
class Forward {
   public:
    // row_weights: [lines] in the order of the embeddings, or null.
    Forward(Batch<T>& batch, const Problem& problem, const T* row_weights)
        : batch_(batch),
          row_weights_(row_weights),
          kernels_(batch.kernels),
          mining_(problem.mining),
          reduction_(problem.reduction),
          passes_(batch, problem),
          block_active_(batch.tiles.row_blocks, 0),
          col_block_active_(batch.both_sides && !batch.square ? batch.tiles.col_blocks : 0, 0) {}

    void accumulate() {
        open_bounds();
        const auto active = [&](const TileAt& at) {
            return block_active_[at.row_block] || (batch_.both_sides && columns_active()[at.col_block]);
        };
        if (!mining_.on && !kernels_.context) {
            passes_.accumulate(active, Kinds::kBoth);
            return;
        }
        // In a square, the rows of a positive pair have one label, and by it both have a loss or neither.
        const auto with_positives = [&](const TileAt& at) {
            return (batch_.square ? block_active_[at.row_block] : active(at)) && batch_.holds_positives(at);
        };

        // 1. The hardest positives bound the negatives.
        if (mining_.on) {
            passes_.find_hardest_positives(with_positives);
            for_rows([&](int64_t i) {
                T& above = batch_.row_stats.neg_above[i];
                if (above == -infinity<T>()) above = passes_.accumulators.min_pos[i] - T(mining_.epsilon);
            });
        }

        // 2. Negatives; the hardest of them bound the positives.
        passes_.accumulate([&](const TileAt& at) { return active(at) && batch_.holds_negatives(at); },
                           Kinds::kNegatives);
        for_rows([&](int64_t i) {
            if (mining_.on)
                set_bounds(i, close_bounds(kernels_, passes_.accumulators, i, batch_.row_stats.neg_above[i],
                                           T(mining_.epsilon)));
            if (kernels_.context) batch_.row_stats.neg_value[i] = passes_.accumulators.neg_value(kernels_, i);
        });

        // 3. Positives.
        passes_.accumulate(with_positives, Kinds::kPositives);
    }

    // The sums over rows of their losses; fills the row stats for backward. row_losses: [lines] in the order
    // of the embeddings, or null.
    Total finish(bool finite, T* row_losses) {
        passes_.clear_unknown_tiles();
        const int64_t pieces = (batch_.lines + kRowPiece - 1) / kRowPiece;
        std::vector<Total> totals(pieces);
        for_tasks(pieces, batch_.lines * 64, [&](int64_t k) {
            const int64_t end = std::min(batch_.lines, (k + 1) * kRowPiece);
            for (int64_t i = k * kRowPiece; i < end; ++i) finish_row(i, finite, row_losses, totals[k]);
        });
        Total total;
        for (const Total& piece : totals) total.add(piece);
        return total;
    }

   private:
    template <typename Visit>
    void for_rows(const Visit& visit) {
        for_pieces(batch_.lines, kRowPiece, batch_.lines * 8, [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; ++i) visit(i);
        });
    }

    // Keeps every pair of the rows that can have a loss, and none of the others.
    void open_bounds() {
        open_blocks(0, batch_.n, block_active_);
        if (!col_block_active_.empty()) open_blocks(batch_.n, batch_.lines, col_block_active_);
    }
    // Of the lines [first, last), in blocks.
    void open_blocks(int64_t first, int64_t last, std::vector<uint8_t>& block_active) {
        const bool mine_self = mining_.on && passes_.mine_self_pair();
        for_tasks(block_active.size(), (last - first) * 8, [&](int64_t block) {
            const int64_t begin = first + block * batch_.tiles.side,
                          end = std::min(last, begin + batch_.tiles.side);
            bool any_active = false;
            for (int64_t i = begin; i < end; ++i) {
                const int64_t positives = mine_self ? batch_.same_label(i) : batch_.positives(i);
                const bool active =
                    row_has_loss(kernels_.needed, mining_.on, positives > 0, batch_.negatives(i) > 0);
                set_bounds(i, active ? Bounds<T>::all() : Bounds<T>::none());
                any_active = any_active || active;
            }
            block_active[block] = any_active;
        });
    }
    const std::vector<uint8_t>& columns_active() const {
        return batch_.square ? block_active_ : col_block_active_;
    }
    void set_bounds(int64_t i, const Bounds<T>& bounds) {
        batch_.row_stats.neg_above[i] = bounds.neg_above;
        batch_.row_stats.pos_below[i] = bounds.pos_below;
    }

    void finish_row(int64_t i, bool finite, T* row_losses, Total& total) {
        const RowOutcome<T> row(kernels_, batch_.params, mining_.on, reduction_, passes_.accumulators, i,
                                batch_.positives(i), batch_.negatives(i), finite);
        row.store(batch_.row_stats, i);
        const T weight = row_weights_ ? row_weights_[batch_.origin(i)] : T(1);
        if (row_losses) row_losses[batch_.origin(i)] = weight * (row.loss.part[0] + row.loss.part[1]);
        total.add(row, weight);
    }

    Batch<T>& batch_;
    const T* const row_weights_;
    const TileKernels<T>& kernels_;
    const Mining mining_;
    const Reduction reduction_;
    TilePasses<T> passes_;
    std::vector<uint8_t> block_active_;      // [row blocks] whether any row of the block can have a loss
    std::vector<uint8_t> col_block_active_;  // [column blocks] the same of columns, or empty
};

template <typename T>
ForwardResult forward(const Call& call) {
    // 1. The memory of `saved`, and the plan in it.
    const Problem problem = describe(call);
    const References refs(call);
    const int64_t n = call.embeddings.size(0);
    const Shape<int64_t> shape = {n, refs.capacity, problem.square, problem.both_directions};
    const Layout<int64_t> layout(shape, sizeof(T), call.kept_bytes());
    const auto options = call.embeddings.options().dtype(c10::CppTypeToScalarType<T>::value);
    Tensor saved = at::empty({layout.bytes}, options.dtype(at::kByte));
    auto* bytes = saved.data_ptr<uint8_t>();
    std::memset(bytes, 0, layout.tiles);

    const Tensor row_labels = call.labels.contiguous();
    const Tensor col_labels = problem.square ? row_labels : refs.labels->contiguous();
    make_plan(row_labels.const_data_ptr<int64_t>(), n, col_labels.const_data_ptr<int64_t>(), refs.count(call),
              problem.square, problem.both_directions, reinterpret_cast<int32_t*>(bytes + layout.plan));

    // 2. The batch, and the passes over its tiles.
    const bool once = !problem.mining.on && !tile_kernels<T>(problem.formula).context;
    Batch<T> batch(call, refs, problem, layout, bytes, once);

    const bool per_row = problem.reduction == Reduction::kNone;
    Tensor loss = per_row               ? at::empty({shape.lines()}, options)
                  : problem.return_sums ? at::empty({4}, options)
                                        : at::empty({}, options);
    T* out = loss.data_ptr<T>();
    const Tensor weights = row_weights<T>(call);
    Forward<T> pass(batch, problem, weights.defined() ? weights.const_data_ptr<T>() : nullptr);
    // With windows, points are packed during the passes: one that is not finite may show only then, and what
    // was accumulated before is not used.
    const bool params_finite = std::all_of(std::begin(problem.params), std::end(problem.params),
                                           [](double value) { return std::isfinite(value); });
    const auto finite = [&] { return params_finite && batch.rows.finite && batch.cols.finite; };
    if (finite()) pass.accumulate();
    const Total total = pass.finish(finite(), per_row ? out : nullptr);

    // 3. The reduction.
    const RowStats<T>& stats = batch.row_stats;
    *stats.poisoned = total.poisoned;
    double sum = 0;
    for (int k = 0; k < 2; ++k) {
        const bool divided = problem.reduction != Reduction::kSum && !per_row;
        const double scale = !divided ? 1.0 : total.count[k] > 0 ? 1.0 / total.count[k] : 0.0;
        stats.scale[k] = static_cast<T>(scale);
        sum += total.poisoned ? total.part[k] : total.part[k] * scale;
        if (problem.return_sums) {
            out[k] = static_cast<T>(total.part[k]);
            out[2 + k] = static_cast<T>(total.count[k]);
        }
    }
    if (!per_row && !problem.return_sums) *out = static_cast<T>(sum);
    return {loss, saved};
}

}  // namespace dml::cpu
