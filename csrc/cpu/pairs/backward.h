// The backward pass: the weights dL/ds of tiles, and the gradients that they give.
//
// It visits the tiles in which forward kept something. For each wave of them it
//   1. computes the weights from the similarities and row stats (weight_tiles.h), and with them what the
//      parameters that learn do to the terms;
//   2. cuts the gradient of each block of points into pieces, one task each (gradient_pieces.h);
//   3. adds the products of weights and points to the pieces, in the order of the tiles (gradient_sums.h).
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
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

// The upstream gradient of the two parts of each row's loss.
template <typename T>
struct Upstream {
    const T *pos, *neg;  // of the part that positives enter, and of the one that negatives enter
    bool per_row;        // one number for each row, in the order of the embeddings, or one for all
    T pos_scale, neg_scale;
    const T* row_weights;  // in the order of the embeddings, or null

    T of_pos(int64_t row) const { return weighted(pos[per_row ? row : 0] * pos_scale, row); }
    T of_neg(int64_t row) const { return weighted(neg[per_row ? row : 0] * neg_scale, row); }

   private:
    T weighted(T value, int64_t row) const { return row_weights ? row_weights[row] * value : value; }
};

template <typename T>
class BackwardPass {
   public:
    // by_params: [kMaxParams] to add the gradient of the parameters to, or null.
    BackwardPass(Batch<T>& batch, const Upstream<T>& upstream, const Tensor& grad_emb, const Tensor& grad_ref,
                 double* by_params)
        : batch_(batch),
          upstream_(upstream),
          by_params_(by_params),
          width_(batch.rows.padded_width()),
          derivatives_(2 * batch.lines),
          weights_(batch, row_weights(), by_params != nullptr),
          grad_rows_(batch.rows, grad_emb),
          grad_cols_(batch.cols, grad_ref) {}

    // by_rows: whether the parameters also get what they do to the rows' losses beside the terms.
    void run(bool by_rows) {
        if (by_params_ && by_rows) add_rows_by_params();
        if (batch_.tiles.count() == 0 || !(grad_rows_.wanted() || grad_cols_.wanted() || by_params_)) return;
        const Tiles& tiles = batch_.tiles;
        const int64_t bytes = batch_.square ? kSquareWeightBytes : kWeightBytes;
        const int64_t slots = std::max<int64_t>(bytes / (tiles.area() * int64_t(sizeof(T))), 1);
        const auto wanted = [&](const TileAt& at) { return batch_.kept[at.index] != 0; };
        const auto visit = [&](const std::vector<TileAt>& wave) {
            weights_.start_wave(wave.size(), std::min(slots, tiles.count()));
            batch_.for_tiles(wave, [&](int64_t k) { weights_.make(wave[k], k); });
            if (by_params_) weights_.add_by_params(by_params_);
            if (grad_rows_.wanted() || grad_cols_.wanted()) add_products(wave);
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

    // The rows' derivatives, times the upstream gradient.
    RowWeights<T> row_weights() {
        const RowStats<T>& stats = batch_.row_stats;
        T *d_neg = derivatives_.data(), *d_pos = d_neg + batch_.lines;
        for_pieces(batch_.lines, kRowPiece, batch_.lines * 4, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                d_neg[i] = upstream_.of_neg(batch_.origin(i)) * stats.d_neg[i];
                d_pos[i] = upstream_.of_pos(batch_.origin(i)) * stats.d_pos[i];
            }
        });
        return {stats.neg_above, stats.pos_below, stats.neg_value, stats.pos_value, d_neg, d_pos};
    }

    void add_rows_by_params() {
        const int64_t pieces = (batch_.lines + kRowPiece - 1) / kRowPiece;
        std::vector<std::array<double, kMaxParams>> sums(pieces);
        for_tasks(pieces, batch_.lines * 64, [&](int64_t k) {
            const int64_t end = std::min(batch_.lines, (k + 1) * kRowPiece);
            for (int64_t i = k * kRowPiece; i < end; ++i) {
                const int64_t row = batch_.origin(i);
                const T parts[2] = {upstream_.of_pos(row), upstream_.of_neg(row)};
                batch_.kernels.row_by_params(batch_.params, batch_.row_stats.gathered(i), parts,
                                             sums[k].data());
            }
        });
        for (const auto& piece : sums) {
            for (int k = 0; k < kMaxParams; ++k) by_params_[k] += piece[k];
        }
    }

    Batch<T>& batch_;
    const Upstream<T> upstream_;
    double* const by_params_;
    const int64_t width_;         // of points and their gradients
    std::vector<T> derivatives_;  // [2, lines]
    WeightTiles<T> weights_;
    GradientSums<T> grad_rows_, grad_cols_;
};

// The gradient of dynamic_params, which are the parameters and, without a gradient, epsilon.
class ParamGradient {
   public:
    ParamGradient(const Call& call, bool wanted) {
        if (!wanted) return;
        TORCH_CHECK_VALUE(call.dynamic_params, "need_params: expected dynamic_params with it");
        numel_ = call.dynamic_params->numel();
    }

    double* sums() { return numel_ > 0 ? sums_ : nullptr; }
    Tensor tensor() const {
        Tensor result = at::zeros({numel_}, at::kDouble);
        std::copy_n(sums_, std::max<int64_t>(numel_ - 1, 0), result.data_ptr<double>());
        return result;
    }

   private:
    int64_t numel_ = 0;
    double sums_[kMaxParams] = {};
};

template <typename T>
BackwardResult backward(const Call& call, const Tensor& grad_loss, const Tensor& saved_bytes, bool need_emb,
                        bool need_ref, bool need_params) {
    // 1. What forward saved.
    const Problem problem = describe(call);
    const References refs(call);
    const int64_t n = call.embeddings.size(0);
    const Shape<int64_t> shape = {n, refs.capacity, problem.square, problem.both_directions};
    const Layout<int64_t> layout(shape, sizeof(T), call.kept_bytes());
    check_backward(call, grad_loss, saved_bytes, layout.bytes);
    auto* saved = saved_bytes.data_ptr<uint8_t>();
    need_ref = need_ref && call.ref_emb.has_value();
    ParamGradient grad_params(call, need_params);
    const auto none = [&] { return at::empty({0}, call.embeddings.options()); };
    if (*RowStats<T>(reinterpret_cast<T*>(saved), shape.lines()).poisoned != T(0)) {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        const auto fill = [&](const Tensor& points) {
            return laid_out_as(points, at::full(points.sizes(), nan, points.options()));
        };
        return {need_emb ? fill(call.embeddings) : none(), need_ref ? fill(*call.ref_emb) : none(),
                at::full_like(grad_params.tensor(), nan)};
    }
    Batch<T> batch(call, refs, problem, layout, saved, true);

    // 2. The upstream gradient: of each row, of the sums, or of the mean.
    constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;
    const Tensor upstream = (grad_loss.scalar_type() == kType ? grad_loss : grad_loss.to(kType)).contiguous();
    const T* g = upstream.const_data_ptr<T>();
    const int last = batch.kernels.parts - 1;
    const T* scale = batch.row_stats.scale;
    const Tensor weights = row_weights<T>(call);
    const T* w = weights.defined() ? weights.const_data_ptr<T>() : nullptr;
    const Upstream<T> of_rows = problem.reduction == Reduction::kNone ? Upstream<T>{g, g, true, 1, 1, w}
                                : problem.return_sums ? Upstream<T>{g, g + last, false, 1, 1, w}
                                                      : Upstream<T>{g, g, false, scale[0], scale[last], w};

    // 3. The gradients.
    const Tensor grad_emb = need_emb ? empty_gradient(call.embeddings, batch.rows.by_columns()) : Tensor();
    const Tensor grad_ref = need_ref ? empty_gradient(*call.ref_emb, batch.cols.by_columns()) : Tensor();
    if (need_ref) grad_ref.narrow(0, batch.m, grad_ref.size(0) - batch.m).zero_();  // not valid
    if (batch.tiles.count() == 0) {
        if (need_emb) grad_emb.zero_();
        if (need_ref) grad_ref.zero_();
    }
    BackwardPass<T>(batch, of_rows, grad_emb, grad_ref, grad_params.sums()).run(true);
    return {need_emb ? laid_out_as(call.embeddings, grad_emb) : none(),
            need_ref ? laid_out_as(*call.ref_emb, grad_ref) : none(), grad_params.tensor()};
}

}  // namespace dml::cpu
