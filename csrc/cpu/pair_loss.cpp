// The CPU engine: which tiles to visit, in which order and how often. The similarities come from
// ATen's matrix product, tile by tile; the loops over pairs are in tile_kernels_impl.h.
//
// Forward, with mining (rows and columns sorted by label, so positives lie beside the diagonal):
//   1. the tiles that hold positives: each row's smallest positive similarity, hence which negatives
//      are kept;
//   2. every tile: log-sum-exp over the kept negatives and their maximum, hence which positives are
//      kept;
//   3. the tiles that hold positives again: log-sum-exp over the kept positives.
// Without mining step 2 does both kinds and is the only one.
//
// Backward visits only the tiles in which something was kept, turns similarities into weights
// dL/ds_ij, and multiplies them by the points: by a dense product, or pair by pair where few are left.
#include <ATen/CPUFunctions.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "plan.h"
#include "points.h"
#include "schedule.h"
#include "tile_kernels.h"

namespace dml::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Memory that may hold similarity tiles from forward to backward, whatever N and M.
constexpr int64_t kCacheBytes = int64_t(64) << 20;

// A tile whose share of non-zero weights is below this is multiplied pair by pair: above it the dense
// product, which wastes work on zeros but uses the cache better, is faster.
constexpr double kSparseShare = 0.4;

// Two bytes more than tiles: a tensor of one element would make torch.compile compile once more.
constexpr int64_t kept_numel(int64_t tiles) { return tiles + 2; }

template <typename T>
struct Scratch {
    T similarities[kTile * kTile];
    T weights[kTile * kTile];
    SparseTile<T> by_row, by_col;

    // Each thread keeps its own from call to call: for a small batch, touching fresh memory would cost
    // as much as the work.
    static Scratch& mine() {
        static thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
        return *scratch;
    }
};

// The rows of a tensor that take part.
OptionalTensor first_rows(const OptionalTensor& x, const OptionalTensor& count) {
    if (!x || !count) return x;
    return x->narrow(0, 0, std::clamp<int64_t>(count->item<int64_t>(), 0, x->size(0)));
}

template <typename T>
Tensor matrix(T* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    return at::from_blob(data, {rows, cols}, {row_stride, col_stride},
                         at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
}

// One batch, prepared: the sorted points on both sides and the tiles between them.
template <typename T>
class Batch {
   public:
    Batch(const Tensor& embeddings, const OptionalTensor& ref_emb, const OptionalTensor& self_ref,
          const Tensor& plan, Tensor tiles, bool normalize)
        : square(!ref_emb),
          n(embeddings.size(0)),
          m(ref_emb ? ref_emb->size(0) : n),
          dim(embeddings.size(1)),
          plan(plan.const_data_ptr<int32_t>(), n, square),
          rows(pack<T>(embeddings, this->plan.row_order, normalize)),
          cols(square ? rows : pack<T>(*ref_emb, this->plan.col_order, normalize)),
          schedule(n, m, square, at::get_num_threads()),
          tiles_(std::move(tiles)),
          cached_(tiles_.numel() / (kTile * kTile)) {
        if (!square && !self_ref) return;
        const Tensor self = self_ref ? self_ref->contiguous() : Tensor();
        own_ = own_columns(this->plan, n, m, self_ref ? self.const_data_ptr<int64_t>() : nullptr);
    }

    const bool square;
    const int64_t n, m, dim;
    const Plan plan;
    const Points<T> rows, cols;
    const Schedule schedule;

    // The tile's place, without its similarities.
    Tile<T> place(const TileAt& at) const {
        const int64_t row0 = at.row_block * kTile, col0 = at.col_block * kTile;
        return {nullptr,
                static_cast<int>(std::min<int64_t>(kTile, n - row0)),
                static_cast<int>(std::min<int64_t>(kTile, m - col0)),
                row0,
                col0,
                plan.pos_begin,
                plan.pos_end,
                own_.empty() ? nullptr : own_.data(),
                square && at.row_block != at.col_block};
    }

    // Similarities from the cache where they are known to be there, else from a product.
    Tile<T> tile(const TileAt& at, bool known) const {
        Tile<T> tile = place(at);
        const bool cached = at.index < cached_;
        T* s = cached ? tiles_.data_ptr<T>() + at.index * kTile * kTile : Scratch<T>::mine().similarities;
        if (!cached || !known) {
            Tensor out = matrix(s, tile.rows, tile.cols, tile.cols, 1);
            at::cpu::mm_out(out, matrix(rows.row(tile.row0), tile.rows, dim, rows.stride(), 1),
                            matrix(cols.row(tile.col0), dim, tile.cols, 1, cols.stride()));
        }
        tile.s = s;
        if (cached && !known) std::fill(s + tile.rows * tile.cols, s + kTile * kTile, T(0));
        return tile;
    }

    // Gives the cached tiles that were not needed a value: what an op returns must not be left to chance.
    void clear_unknown(const std::vector<uint8_t>& known) const {
        for (int64_t index = 0; index < cached_; ++index) {
            T* s = tiles_.data_ptr<T>() + index * kTile * kTile;
            if (!known[index]) std::fill(s, s + kTile * kTile, T(0));
        }
    }

    // Calls visit for every tile that is wanted, in rounds that share no rows and no columns.
    template <typename Wanted, typename Visit>
    void for_each_tile(const Wanted& wanted, const Visit& visit) const {
        std::vector<std::vector<TileAt>> tasks;
        for (int64_t round = 0; round < schedule.rounds(); ++round) {
            tasks.clear();
            for (int64_t k = 0; k < schedule.round_size(round); ++k) {
                std::vector<TileAt> task;
                schedule.for_each_tile(round, k, [&](const TileAt& at) {
                    if (wanted(at)) task.push_back(at);
                });
                if (!task.empty()) tasks.push_back(std::move(task));
            }
            at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t from, int64_t to) {
                for (int64_t k = from; k < to; ++k) {
                    for (const TileAt& at : tasks[k]) visit(at);
                }
            });
        }
    }

    // The pairs of row i that may count, and that mining compares: in a square matrix the self pair is none,
    // where the columns are other points that hold row i's own it is mined with but does not count.
    int64_t positives(int64_t i) const { return same_label(i) - (has_own_positive(i) ? 1 : 0); }
    int64_t negatives(int64_t i) const { return m - same_label(i); }
    int64_t mined_positives(int64_t i) const { return square ? positives(i) : same_label(i); }
    bool counts_all_mined() const { return square || own_.empty(); }

    bool holds_positives(const Tile<T>& tile) const {
        const int64_t last = tile.row0 + tile.rows - 1;
        return plan.pos_begin[tile.row0] < tile.col0 + tile.cols && plan.pos_end[last] > tile.col0;
    }
    bool holds_negatives(const Tile<T>& tile) const {
        const int64_t last = tile.row0 + tile.rows - 1;
        return plan.pos_begin[last] > tile.col0 || plan.pos_end[tile.row0] < tile.col0 + tile.cols;
    }

   private:
    int64_t same_label(int64_t i) const { return plan.pos_end[i] - plan.pos_begin[i]; }
    bool has_own_positive(int64_t i) const {
        return !own_.empty() && own_[i] >= plan.pos_begin[i] && own_[i] < plan.pos_end[i];
    }

    Tensor tiles_;
    int64_t cached_;
    std::vector<int32_t> own_;
};

// stats: [neg_above N | pos_below N | lse_neg N | lse_pos N | scale | poisoned]
template <typename T>
struct Stats {
    T *neg_above, *pos_below, *lse_neg, *lse_pos, *scale, *poisoned;

    Stats(T* data, int64_t n)
        : neg_above(data),
          pos_below(data + n),
          lse_neg(data + 2 * n),
          lse_pos(data + 3 * n),
          scale(data + 4 * n),
          poisoned(data + 4 * n + 1) {}

    static int64_t numel(int64_t n) { return 4 * n + 2; }
};

template <typename T>
void accumulate_batch(const Batch<T>& batch, const TileKernels<T>& kernels, const double* params,
                      std::optional<double> epsilon, std::vector<RowState<T>>& state,
                      std::vector<uint8_t>& known, uint8_t* kept) {
    const int64_t n = batch.n;
    std::vector<uint8_t> block_active(Schedule::blocks(n), 0);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t positives = epsilon ? batch.mined_positives(i) : batch.positives(i);
        const bool both = positives > 0 && batch.negatives(i) > 0;
        const bool active = both || (!epsilon && !kernels.needs_both);
        state[i].bounds = active ? Bounds<T>::all() : Bounds<T>::none();
        if (active) block_active[i / kTile] = 1;
    }
    const auto active = [&](const TileAt& at) {
        return block_active[at.row_block] || (batch.square && block_active[at.col_block]);
    };
    const auto with_positives = [&](const TileAt& at) {
        return active(at) && batch.holds_positives(batch.place(at));
    };
    const auto load = [&](const TileAt& at) {
        const Tile<T> tile = batch.tile(at, known[at.index]);
        known[at.index] = 1;
        return tile;
    };
    const auto pass = [&](const auto& wanted, Kinds kinds) {
        batch.for_each_tile(wanted, [&](const TileAt& at) {
            if (kernels.accumulate(load(at), params, kinds, state.data())) kept[at.index] = 1;
        });
    };
    if (!epsilon) {
        pass(active, Kinds::kBoth);
        return;
    }
    const T margin = static_cast<T>(*epsilon);
    std::vector<T> min_pos(n, infinity<T>());
    batch.for_each_tile(with_positives, [&](const TileAt& at) {
        Tile<T> tile = load(at);
        if (!batch.square) tile.own = nullptr;  // mining sees it
        kernels.min_positives(tile, min_pos.data());
    });
    for (int64_t i = 0; i < n; ++i) {
        if (state[i].bounds.pos_below == infinity<T>()) state[i].bounds.neg_above = min_pos[i] - margin;
    }
    pass([&](const TileAt& at) { return active(at) && batch.holds_negatives(batch.place(at)); },
         Kinds::kNegatives);
    for (int64_t i = 0; i < n; ++i) {
        state[i].bounds.pos_below = state[i].neg.empty() ? -infinity<T>() : state[i].max_neg + margin;
    }
    pass(with_positives, Kinds::kPositives);
    for (int64_t i = 0; i < n; ++i) {
        // In exact arithmetic both kept sets are empty together; rounding must not part them. Only a row
        // that lost a positive which was itself may keep negatives alone.
        const bool parted = state[i].pos.empty() && batch.positives(i) == batch.mined_positives(i);
        if (state[i].neg.empty() || parted) state[i] = RowState<T>{Bounds<T>::none()};
    }
}

template <typename T>
double reduction_scale(const Batch<T>& batch, Reduction reduction, bool mined, const std::vector<T>& loss,
                       const std::vector<RowState<T>>& state) {
    int64_t count = 1;
    if (reduction == Reduction::kMean) count = static_cast<int64_t>(loss.size());
    if (reduction == Reduction::kMeanNonzero) {
        count = std::count_if(loss.begin(), loss.end(), [](T value) { return value != T(0); });
    }
    if (reduction == Reduction::kMeanValid) {
        count = 0;  // without mining every pair is kept, also where the loss needs both kinds and is 0
        for (int64_t i = 0; i < batch.n; ++i) {
            count += mined ? !state[i].pos.empty() || !state[i].neg.empty()
                           : batch.positives(i) + batch.negatives(i) > 0;
        }
    }
    return count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& labels,
                                                           const OptionalTensor& ref_emb,
                                                           const OptionalTensor& ref_labels,
                                                           const OptionalTensor& self_ref, int64_t capacity,
                                                           PairLoss which, const double* params,
                                                           std::optional<double> epsilon, bool normalize,
                                                           Reduction reduction, bool save_for_backward) {
    const bool square = !ref_emb;
    const int64_t n = embeddings.size(0), m = square ? n : ref_emb->size(0);
    TORCH_CHECK_VALUE(std::max(n, m) < std::numeric_limits<int32_t>::max(), "embeddings: too many rows, ", n);
    const auto options = embeddings.options().dtype(c10::CppTypeToScalarType<T>::value);
    const int64_t all_tiles = Schedule(n, capacity, square, 1).tiles();
    const int64_t cached =
        save_for_backward ? std::min<int64_t>(all_tiles, kCacheBytes / (kTile * kTile * sizeof(T))) : 0;
    Tensor stats = at::empty({Stats<T>::numel(n)}, options);
    Tensor plan = at::zeros({Plan::numel(n, capacity, square)}, options.dtype(at::kInt));
    Tensor tiles = at::empty({cached * kTile * kTile}, options);
    Tensor kept = at::zeros({kept_numel(all_tiles)}, options.dtype(at::kByte));

    const Tensor row_labels = labels.contiguous(),
                 col_labels = square ? row_labels : ref_labels->contiguous();
    make_plan(row_labels.const_data_ptr<int64_t>(), n, col_labels.const_data_ptr<int64_t>(), m, square,
              plan.data_ptr<int32_t>());
    const Batch<T> batch(embeddings, ref_emb, self_ref, plan, tiles, normalize);
    const TileKernels<T>& kernels = tile_kernels<T>(which);

    std::vector<RowState<T>> state(n, RowState<T>{Bounds<T>::none()});
    const bool finite = batch.rows.finite && batch.cols.finite;
    std::vector<uint8_t> known(all_tiles, 0);
    if (finite) accumulate_batch(batch, kernels, params, epsilon, state, known, kept.data_ptr<uint8_t>());
    batch.clear_unknown(known);

    const Stats<T> saved(stats.data_ptr<T>(), n);
    std::vector<T> loss(n);
    *saved.poisoned = 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool some = batch.positives(i) > 0 || batch.negatives(i) > 0;
        const bool both = batch.positives(i) > 0 && batch.negatives(i) > 0;
        saved.neg_above[i] = state[i].bounds.neg_above;
        saved.pos_below[i] = state[i].bounds.pos_below;
        saved.lse_neg[i] = state[i].neg.value(kernels.counts_one);
        saved.lse_pos[i] = state[i].pos.value(kernels.counts_one);
        const bool has_loss = kernels.needs_both ? !state[i].pos.empty() && !state[i].neg.empty()
                                                 : !state[i].pos.empty() || !state[i].neg.empty();
        loss[i] = has_loss ? kernels.loss(params, saved.lse_pos[i], saved.lse_neg[i]) : T(0);
        if (!finite && (kernels.needs_both || epsilon ? both : some)) {
            loss[i] = std::numeric_limits<T>::quiet_NaN();
            *saved.poisoned = 1;
        }
    }
    const double scale = reduction_scale(batch, reduction, epsilon.has_value(), loss, state);
    *saved.scale = static_cast<T>(scale);
    Tensor result;
    if (reduction == Reduction::kNone) {
        result = at::empty({n}, options);
        for (int64_t i = 0; i < n; ++i) result.data_ptr<T>()[batch.plan.row_order[i]] = loss[i];
    } else {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += loss[i];
        result = at::empty({}, options);
        *result.data_ptr<T>() = static_cast<T>(n == 0 ? 0.0 : *saved.poisoned ? sum : sum * scale);
    }
    return {result, stats, plan, tiles, kept};
}

// What forward saved, as far as a wrong size could lead outside of it.
template <typename T>
void check_saved(const Tensor& grad_loss, int64_t n, int64_t m, bool square, const Tensor& stats,
                 const Tensor& plan, const Tensor& tiles, const Tensor& kept, Reduction reduction) {
    const auto check = [](const Tensor& saved, int64_t numel, const char* name) {
        TORCH_CHECK_VALUE(saved.dim() == 1 && saved.numel() == numel && saved.is_contiguous(), name,
                          ": expected the ", numel, " elements that forward saved, got shape ",
                          saved.sizes());
    };
    const int64_t all_tiles = Schedule(n, m, square, 1).tiles(), area = kTile * kTile;
    check(stats, Stats<T>::numel(n), "stats");
    check(plan, Plan::numel(n, m, square), "plan");
    check(kept, kept_numel(all_tiles), "kept");
    check(tiles, std::min(tiles.numel() / area, all_tiles) * area, "tiles");
    const int64_t losses = reduction == Reduction::kNone ? n : 1;
    TORCH_CHECK_VALUE(grad_loss.numel() == losses, "grad_loss: expected ", losses, " elements, got shape ",
                      grad_loss.sizes());
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& embeddings,
                                    const OptionalTensor& ref_emb, const OptionalTensor& self_ref,
                                    int64_t capacity, const Tensor& stats, const Tensor& plan,
                                    const Tensor& tiles, const Tensor& kept, PairLoss which,
                                    const double* params, bool normalize, Reduction reduction, bool need_emb,
                                    bool need_ref) {
    check_saved<T>(grad_loss, embeddings.size(0), capacity, !ref_emb, stats, plan, tiles, kept, reduction);
    const Stats<T> saved(stats.data_ptr<T>(), embeddings.size(0));
    const Tensor none = at::empty({0}, embeddings.options());
    if (*saved.poisoned != T(0)) {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        const auto fill = [&](const Tensor& like) { return at::full(like.sizes(), nan, like.options()); };
        return {need_emb ? fill(embeddings) : none, need_ref && ref_emb ? fill(*ref_emb) : none};
    }
    const Batch<T> batch(embeddings, ref_emb, self_ref, plan, tiles, normalize);
    const TileKernels<T>& kernels = tile_kernels<T>(which);
    const bool square = batch.square;
    const int64_t n = batch.n, dim = batch.dim, stride = batch.rows.stride();
    const bool rows_wanted = square || need_emb, cols_wanted = !square && need_ref;

    const Tensor upstream = grad_loss.to(stats.scalar_type()).contiguous();
    std::vector<T> weight_neg(n), weight_pos(n);
    for (int64_t i = 0; i < n; ++i) {
        const T g = reduction == Reduction::kNone ? upstream.const_data_ptr<T>()[batch.plan.row_order[i]]
                                                  : *upstream.const_data_ptr<T>() * *saved.scale;
        const PosNeg<T> slope = kernels.dloss_dlse(params, saved.lse_pos[i], saved.lse_neg[i]);
        weight_neg[i] = g * slope.neg;
        weight_pos[i] = g * slope.pos;
    }
    const RowWeights<T> rows = {saved.neg_above, saved.pos_below,   saved.lse_neg,
                                saved.lse_pos,   weight_neg.data(), weight_pos.data()};

    const auto options = stats.options();
    Tensor grad_rows = at::zeros({rows_wanted ? n : 0, dim}, options);
    Tensor grad_cols = at::zeros({cols_wanted ? batch.m : 0, dim}, options);
    const uint8_t* any = kept.const_data_ptr<uint8_t>();
    batch.for_each_tile(
        [&](const TileAt& at) { return any[at.index] != 0; },
        [&](const TileAt& at) {
            Tile<T> tile = batch.tile(at, true);
            tile.both_sides = square;  // W + W^T, for the diagonal tiles too
            const bool to_cols = square ? at.row_block != at.col_block : cols_wanted;
            Scratch<T>& scratch = Scratch<T>::mine();
            const int64_t count = kernels.weights(tile, params, rows, scratch.weights);
            const int64_t pairs = int64_t(tile.rows) * tile.cols;
            T* x = batch.rows.row(tile.row0);
            T* y = batch.cols.row(tile.col0);
            T* out_x = rows_wanted ? grad_rows.data_ptr<T>() + tile.row0 * dim : nullptr;
            T* out_y = (square ? grad_rows : grad_cols).template data_ptr<T>() + tile.col0 * dim;
            if (count < kSparseShare * pairs) {
                kernels.compress(scratch.weights, tile.rows, tile.cols, scratch.by_row, scratch.by_col);
                if (rows_wanted) kernels.add_product(scratch.by_row, tile.rows, y, stride, dim, out_x, dim);
                if (to_cols) kernels.add_product(scratch.by_col, tile.cols, x, stride, dim, out_y, dim);
                return;
            }
            const auto add = [&](T* out, int64_t lines, const Tensor& w, T* points, int64_t inner) {
                Tensor sum = matrix(out, lines, dim, dim, 1);
                at::cpu::addmm_out(sum, sum, w, matrix(points, inner, dim, stride, 1), 1, 1);
            };
            if (rows_wanted)
                add(out_x, tile.rows, matrix(scratch.weights, tile.rows, tile.cols, tile.cols, 1), y,
                    tile.cols);
            if (to_cols)
                add(out_y, tile.cols, matrix(scratch.weights, tile.cols, tile.rows, 1, tile.cols), x,
                    tile.rows);
        });
    const auto finish = [&](const Tensor& gradient, const Points<T>& points, const int32_t* order,
                            const Tensor& like) {
        return unpack_gradient<T>(gradient, points, order, like, normalize);
    };
    return {need_emb ? finish(grad_rows, batch.rows, batch.plan.row_order, embeddings) : none,
            cols_wanted ? finish(grad_cols, batch.cols, batch.plan.col_order, *ref_emb) : none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pair_loss(
    const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
    const OptionalTensor& ref_labels, const OptionalTensor& self_ref, const OptionalTensor& ref_count,
    c10::string_view loss, at::ArrayRef<double> params, std::optional<double> epsilon, bool normalize,
    c10::string_view reduction, bool save_for_backward) {
    check_inputs(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count);
    const PairLoss which = parse_loss(loss, params);
    const Reduction how = parse_reduction(reduction);
    const auto run = embeddings.scalar_type() == at::kDouble ? forward<double> : forward<float>;
    return run(embeddings, labels, first_rows(ref_emb, ref_count), first_rows(ref_labels, ref_count),
               self_ref, (ref_emb ? *ref_emb : embeddings).size(0), which, params.data(), epsilon, normalize,
               how, save_for_backward);
}

std::tuple<Tensor, Tensor> pair_loss_backward(
    const Tensor& grad_loss, const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
    const OptionalTensor& ref_labels, const OptionalTensor& self_ref, const OptionalTensor& ref_count,
    const Tensor& stats, const Tensor& plan, const Tensor& tiles, const Tensor& kept, c10::string_view loss,
    at::ArrayRef<double> params, bool normalize, c10::string_view reduction, bool need_emb, bool need_ref) {
    check_inputs(embeddings, labels, ref_emb, ref_labels, self_ref, ref_count);
    const PairLoss which = parse_loss(loss, params);
    const Reduction how = parse_reduction(reduction);
    const auto run = embeddings.scalar_type() == at::kDouble ? backward<double> : backward<float>;
    const OptionalTensor refs = first_rows(ref_emb, ref_count);
    auto [grad_emb, grad_ref] =
        run(grad_loss, embeddings, refs, self_ref, (ref_emb ? *ref_emb : embeddings).size(0), stats, plan,
            tiles, kept, which, params.data(), normalize, how, need_emb, need_ref);
    if (ref_count && need_ref) {  // the others took no part
        Tensor all = at::zeros(ref_emb->sizes(), ref_emb->options());
        all.narrow(0, 0, refs->size(0)).copy_(grad_ref);
        grad_ref = all;
    }
    return {grad_emb, grad_ref};
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("pair_loss", &pair_loss);
    m.impl("pair_loss_backward", &pair_loss_backward);
}

}  // namespace dml::cpu
