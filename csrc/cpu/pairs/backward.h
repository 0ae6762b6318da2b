// The backward pass: the weights dL/ds of tiles, and the gradients that they give.
//
// It visits the tiles in which forward kept something. For each wave of them it
//   1. computes the weights from the similarities and row stats (weight_tiles.h);
//   2. cuts the gradient of each block of points into pieces, one task each (gradient_pieces.h);
//   3. adds the products of weights and points to the pieces, in the order of the tiles (gradient_sums.h).
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/pairs/batch.h"
#include "cpu/pairs/gradient_pieces.h"
#include "cpu/pairs/gradient_sums.h"
#include "cpu/pairs/weight_tiles.h"
#include "torch/columns.h"

namespace dml::cpu {

// Memory of the weights of one wave of tiles.
constexpr int64_t kSquareWeightBytes = int64_t(16) << 20, kWeightBytes = int64_t(8) << 20;

template <typename T>
class BackwardPass {
   public:
    BackwardPass(Batch<T>& batch, const RowWeights<T>& rows, const Tensor& grad_emb, const Tensor& grad_ref)
        : batch_(batch),
          width_(batch.rows.padded_width()),
          weights_(batch, rows),
          grad_rows_(batch.rows, grad_emb),
          grad_cols_(batch.cols, grad_ref) {}

    void run() {
        const Tiles& tiles = batch_.tiles;
        const int64_t bytes = batch_.square ? kSquareWeightBytes : kWeightBytes;
        const int64_t slots = std::max<int64_t>(bytes / (tiles.area() * int64_t(sizeof(T))), 1);
        const auto wanted = [&](const TileAt& at) { return batch_.kept[at.index] != 0; };
        const auto visit = [&](const std::vector<TileAt>& wave) {
            weights_.start_wave(wave.size(), std::min(slots, tiles.count()));
            batch_.for_tiles(wave, [&](int64_t k) { weights_.make(wave[k], k); });
            add_products(wave);
        };
        // The sums of a row block are complete after the tile groups of its rows, which follow each other.
        // Those of a column block are complete after one tile group if that holds all rows, else at the end.
        const auto row_end = [&](int64_t block) { return std::min(block * tiles.side, batch_.n); };
        const auto col_end = [&](int64_t block) { return std::min(block * tiles.side, batch_.m); };
        const bool cols_per_group = batch_.windows && tiles.whole_columns();
        if (!cols_per_group) grad_cols_.open(0, batch_.m);
        const auto enter = [&](const Tiles::TileGroup& group) {
            grad_rows_.open(group.i0 * tiles.side, row_end(group.i1));
            if (cols_per_group) grad_cols_.open(group.j0 * tiles.side, col_end(group.j1));
        };
        const auto leave = [&](const Tiles::TileGroup& group) {
            if (group.j1 == tiles.col_blocks) grad_rows_.close(group.i0 * tiles.side, row_end(group.i1));
            if (cols_per_group) grad_cols_.close(group.j0 * tiles.side, col_end(group.j1));
        };
        batch_.for_each_wave(slots, wanted, visit, enter, leave);
        if (!cols_per_group) grad_cols_.close(0, batch_.m);
    }

   private:
    void add_products(const std::vector<TileAt>& wave) {
        const Owners owners(wave, batch_.tiles, grad_rows_.wanted(), batch_.square || grad_cols_.wanted());
        const std::vector<GradientPiece> pieces =
            cut_gradient(owners, batch_.tiles.side, width_, [&](int64_t k) { return weights_.work(k); });
        const int64_t work = int64_t(wave.size()) * batch_.tiles.area() * (width_ / 8 + 1);
        for_tasks(pieces.size(), work, [&](int64_t task) {
            const GradientPiece& piece = pieces[task];
            const GradientSums<T>& gradient = owners.is_rows(piece.owner) ? grad_rows_ : grad_cols_;
            T* out = gradient.row(owners.first(piece.owner) + piece.line) + piece.dim;
            for (const auto* share = owners.begin(piece.owner); share != owners.end(piece.owner); ++share)
                weights_.add_product(wave[share->tile], share->tile, share->as_rows, piece.line, piece.lines,
                                     piece.dim, piece.dims, out, width_);
        });
    }

    Batch<T>& batch_;
    const int64_t width_;  // of points and their gradients
    WeightTiles<T> weights_;
    GradientSums<T> grad_rows_, grad_cols_;
};

template <typename T>
BackwardResult backward(const Call& call, const Tensor& grad_loss, const Tensor& saved_bytes, bool need_emb,
                        bool need_ref) {
    // 1. What forward saved.
    const Problem problem = describe(call);
    const References refs(call);
    const int64_t n = call.embeddings.size(0);
    const Layout<int64_t> layout(n, refs.capacity, problem.square, sizeof(T), call.save_for_backward);
    check_backward(call, grad_loss, saved_bytes, layout.bytes);
    auto* saved = saved_bytes.data_ptr<uint8_t>();
    need_ref = need_ref && call.ref_emb.has_value();
    const auto none = [&] { return at::empty({0}, call.embeddings.options()); };
    if (*RowStats<T>(reinterpret_cast<T*>(saved), n).poisoned != T(0)) {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        const auto fill = [&](const Tensor& points) {
            return laid_out_as(points, at::full(points.sizes(), nan, points.options()));
        };
        return {need_emb ? fill(call.embeddings) : none(), need_ref ? fill(*call.ref_emb) : none()};
    }
    Batch<T> batch(call, refs, problem, layout, saved, true);

    // 2. The rows' derivatives, times the upstream gradient.
    constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;
    const Tensor upstream = (grad_loss.scalar_type() == kType ? grad_loss : grad_loss.to(kType)).contiguous();
    const T* g = upstream.const_data_ptr<T>();
    const int last = batch.kernels.parts - 1;
    const bool per_row = problem.reduction == Reduction::kNone;
    std::vector<T> d(2 * n);
    T *d_neg = d.data(), *d_pos = d_neg + n;
    for_pieces(n, kRowPiece, n * 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const T up_pos = per_row               ? g[batch.plan.row_order[i]]
                             : problem.return_sums ? g[0]
                                                   : *g * batch.row_stats.scale[0];
            const T up_neg = per_row               ? up_pos
                             : problem.return_sums ? g[last]
                                                   : *g * batch.row_stats.scale[last];
            d_neg[i] = up_neg * batch.row_stats.d_neg[i];
            d_pos[i] = up_pos * batch.row_stats.d_pos[i];
        }
    });
    const RowWeights<T> rows = {batch.row_stats.neg_above,
                                batch.row_stats.pos_below,
                                batch.row_stats.neg_value,
                                batch.row_stats.pos_value,
                                d_neg,
                                d_pos};

    // 3. The gradients.
    const Tensor grad_emb = need_emb ? empty_gradient(call.embeddings, batch.rows.by_columns()) : Tensor();
    const Tensor grad_ref = need_ref ? empty_gradient(*call.ref_emb, batch.cols.by_columns()) : Tensor();
    if (need_ref) grad_ref.narrow(0, batch.m, grad_ref.size(0) - batch.m).zero_();  // not valid
    if (batch.tiles.count() == 0) {
        if (need_emb) grad_emb.zero_();
        if (need_ref) grad_ref.zero_();
    } else if (need_emb || need_ref) {
        BackwardPass<T>(batch, rows, grad_emb, grad_ref).run();
    }
    return {need_emb ? laid_out_as(call.embeddings, grad_emb) : none(),
            need_ref ? laid_out_as(*call.ref_emb, grad_ref) : none()};
}

}  // namespace dml::cpu
