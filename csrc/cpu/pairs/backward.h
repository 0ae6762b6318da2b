// The backward pass: weights of tiles, and the gradients that they make.
//
// It visits only the tiles in which something was kept, turns similarities into weights dL/ds_ij, and
// multiplies them by the points: each block of rows and panel of dimensions is one task, which adds its tiles
// in order, by a dense product, or pair by pair where few are left.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/pairs/batch.h"

namespace dml::cpu {

// Memory of the weights of one wave of tiles.
constexpr int64_t kSquareWeightBytes = int64_t(16) << 20, kWeightBytes = int64_t(8) << 20;

// A tile whose share of non-zero weights is below this is multiplied pair by pair: above it the dense
// product, which wastes work on zeros but uses the cache better, is faster.
constexpr double kSparseShare = 0.4;

// The gradient of one side: summed up for the points that are in the window, then handed on.
template <typename T>
class Gradient {
   public:
    // out: where it goes, undefined where it is not wanted.
    Gradient(const PackedPoints<T>& points, const Tensor& out) : points_(points), out_(out) {}

    bool wanted() const { return out_.defined(); }
    bool is_open() const { return open_; }
    T* row(int64_t i) const { return sum_.data() + (i - first_) * points_.padded_width(); }

    // Begins the sums of the points from first to last, unless they are those under way.
    void open(int64_t first, int64_t last) {
        if (!wanted() || (open_ && first == first_)) return;
        const int64_t width = points_.padded_width();
        sum_.reserve(padded(last - first) * width);
        first_ = first;
        open_ = true;
        for_pieces(last - first, row_piece(width), (last - first) * row_work(width) / 4,
                   [&](int64_t from, int64_t to) { std::fill(row(first + from), row(first + to), T(0)); });
    }

    // Ends them; without a beginning they are 0.
    void close(int64_t first, int64_t last) {
        if (!wanted()) return;
        if (open_) {
            unpack(static_cast<const T*>(row(first)), points_, first, last - first, out_);
        } else {
            clear_rows(points_, first, last - first, out_);
        }
        open_ = false;
    }

   private:
    const PackedPoints<T>& points_;
    const Tensor out_;  // [N, D]
    Numbers<T> sum_;    // [padded(window), padded width]
    int64_t first_ = 0;
    bool open_ = false;
};

template <typename T>
class BackwardPass {
   public:
    BackwardPass(Batch<T>& batch, const RowWeights<T>& rows, const Tensor& grad_emb, const Tensor& grad_ref)
        : batch_(batch),
          weights_(rows),
          width_(batch.rows.padded_width()),
          grad_rows_(batch.rows, grad_emb),
          grad_cols_(batch.cols, grad_ref) {}

    void run() {
        const Tiles& tiles = batch_.tiles;
        const int64_t bytes = batch_.square ? kSquareWeightBytes : kWeightBytes;
        const int64_t slots = std::max<int64_t>(bytes / (tiles.area() * int64_t(sizeof(T))), 1);
        const auto wanted = [&](const TileAt& at) { return batch_.kept[at.index] != 0; };
        const auto visit = [&](const std::vector<TileAt>& wave) {
            const int64_t count = wave.size();
            memory_.reserve(std::min(slots, tiles.count()) * tiles.area());
            nonzeros_.assign(count, 0);
            batch_.for_tiles(wave, [&](int64_t k) { make_weights(wave[k], k); });
            add_gradients(wave);
        };
        // The sums of a block of rows are complete after all of its tile_group-tiles, which follow each
        // other; those of columns after one tile_group-tile if that holds all rows, else in the end.
        const bool at_once = batch_.windows && tiles.whole_columns();
        if (!at_once) grad_cols_.open(0, batch_.m);
        const auto enter = [&](const Tiles::TileGroup& tile_group) {
            grad_rows_.open(tile_group.i0 * tiles.side, std::min(tile_group.i1 * tiles.side, batch_.n));
            if (at_once)
                grad_cols_.open(tile_group.j0 * tiles.side, std::min(tile_group.j1 * tiles.side, batch_.m));
        };
        const auto leave = [&](const Tiles::TileGroup& tile_group, bool) {
            if (tile_group.j1 == tiles.col_blocks)
                close(grad_rows_, batch_.rows, tile_group.i0 * tiles.side,
                      std::min(tile_group.i1 * tiles.side, batch_.n));
            if (at_once)
                close(grad_cols_, batch_.cols, tile_group.j0 * tiles.side,
                      std::min(tile_group.j1 * tiles.side, batch_.m));
        };
        batch_.for_each_wave(slots, wanted, visit, enter, leave);
        if (!at_once) close(grad_cols_, batch_.cols, 0, batch_.m);
    }

   private:
    Batch<T>& batch_;
    const RowWeights<T> weights_;
    const int64_t width_;
    Numbers<T> memory_;              // the weights of a wave, tile by tile, dense or as a SparseTile
    std::vector<int64_t> nonzeros_;  // of each tile; kDense where they are not told apart
    Gradient<T> grad_rows_, grad_cols_;
    static constexpr int64_t kDense = -1;

    // A gradient's way back needs its points.
    static void close(Gradient<T>& gradient, PackedPoints<T>& points, int64_t first, int64_t last) {
        if (gradient.wanted() && gradient.is_open()) points.show(first, last);
        gradient.close(first, last);
    }

    T* slot(int64_t k) const { return memory_.data() + k * batch_.tiles.area(); }

    void make_weights(const TileAt& at, int64_t k) {
        Tile<T> tile = batch_.tile(at, true);
        tile.both_sides = batch_.square;  // W + W^T, for the diagonal tiles too
        const int64_t pairs = int64_t(tile.rows) * tile.cols, size = padded(tile.rows) * tile.pitch;
        if (size > pairs) std::fill(slot(k), slot(k) + size, T(0));
        const int64_t count =
            batch_.kernels.weights(tile, batch_.params, batch_.similarity.euclidean, weights_, slot(k));
        const bool sparse =
            count < kSparseShare * pairs &&
            SparseTile<T>::bytes(tile.rows, tile.cols, count) <= batch_.tiles.area() * int64_t(sizeof(T));
        nonzeros_[k] = sparse ? count : kDense;
        if (!sparse || count == 0) return;
        T* dense = Scratch<T>::mine().tile;
        std::memcpy(dense, slot(k), size * sizeof(T));
        batch_.kernels.compress(dense, tile.pitch, tile.rows, tile.cols, count, slot(k));
    }

    // Some lines of a block and some dimensions, which one task adds up.
    struct Piece {
        int64_t owner, line, lines, dim, dims, work;
    };

    // Cuts the blocks where there is more than one thread: into panels of dimensions, then into lines, each
    // block into as many pieces as its share of the work asks for. The longest come first, so that no thread
    // begins one when the others are done. What a piece adds up does not depend on where it ends.
    std::vector<Piece> cut(const Owners& owners) const {
        constexpr int64_t kDims = 64, kLines = 32, kPiecesPerThread = 4;
        if (width_ == 0) return {};  // points without dimensions
        std::vector<int64_t> work(owners.size(), 0);
        int64_t all = 0;
        for (int64_t k = 0; k < owners.size(); ++k) {
            for (const auto* share = owners.begin(k); share != owners.end(k); ++share) {
                const int64_t count = nonzeros_[share->tile];
                work[k] += count == kDense ? batch_.tiles.area() : 2 * count;
            }
            all += work[k];
        }
        const int64_t threads = thread_count();
        std::vector<Piece> pieces;
        for (int64_t k = 0; k < owners.size(); ++k) {
            if (work[k] == 0) continue;
            const int64_t wanted = threads == 1 ? 1 : 1 + work[k] * kPiecesPerThread * threads / all;
            const int64_t panels = std::min(wanted, (width_ + kDims - 1) / kDims);
            const int64_t dims = (width_ / panels + kDims - 1) / kDims * kDims;
            const int64_t strips = std::clamp<int64_t>(wanted / panels, 1, batch_.tiles.side / kLines);
            const int64_t lines = (batch_.tiles.side / strips + kLines - 1) / kLines * kLines;
            const int64_t here = lines_of(owners, k);
            for (int64_t line = 0; line < here; line += lines) {
                for (int64_t dim = 0; dim < width_; dim += dims) {
                    const int64_t high = std::min(lines, here - line), wide = std::min(dims, width_ - dim);
                    pieces.push_back({k, line, high, dim, wide, work[k] / here * high * wide});
                }
            }
        }
        if (threads > 1) {
            std::stable_sort(pieces.begin(), pieces.end(),
                             [](const Piece& a, const Piece& b) { return a.work > b.work; });
        }
        return pieces;
    }

    int64_t lines_of(const Owners& owners, int64_t k) const {
        const int64_t first = owners.block(k) * batch_.tiles.side;
        return std::min<int64_t>(batch_.tiles.side, (owners.is_rows(k) ? batch_.n : batch_.m) - first);
    }

    void add_gradients(const std::vector<TileAt>& wave) {
        const Owners owners(wave, batch_.tiles, grad_rows_.wanted(), batch_.square || grad_cols_.wanted());
        const std::vector<Piece> pieces = cut(owners);
        const int64_t work = int64_t(wave.size()) * batch_.tiles.area() * (width_ / 8 + 1);
        for_tasks(pieces.size(), work, [&](int64_t task) {
            const Piece& piece = pieces[task];
            const int64_t first = owners.block(piece.owner) * batch_.tiles.side + piece.line;
            const Gradient<T>& gradient = owners.is_rows(piece.owner) ? grad_rows_ : grad_cols_;
            T* out = gradient.row(first) + piece.dim;
            for (const auto* share = owners.begin(piece.owner); share != owners.end(piece.owner); ++share)
                add_share(wave[share->tile], *share, piece, out);
        });
    }

    // Adds the weights of a tile times the points on its other side to the lines of a piece.
    void add_share(const TileAt& at, const Owners::Share& share, const Piece& piece, T* out) const {
        const int64_t count = nonzeros_[share.tile];
        if (count == 0) return;
        const Tile<T> tile = batch_.place(at);
        const PackedPoints<T>& points = share.as_rows ? batch_.cols : batch_.rows;
        T* x = points.row(share.as_rows ? tile.col0 : tile.row0) + piece.dim;
        if (count != kDense) {
            const SparseTile<T> sparse(slot(share.tile), tile.rows, tile.cols, count);
            auto lines = share.as_rows ? sparse.by_row : sparse.by_col;
            lines.start += piece.line;
            batch_.kernels.add_product(lines, static_cast<int>(piece.lines), x, points.stride(), piece.dims,
                                       out, width_);
            return;
        }
        const T* w = slot(share.tile) + piece.line * (share.as_rows ? tile.pitch : 1);
        const Strided<T> weights =
            share.as_rows ? Strided<T>{w, tile.pitch, 1} : Strided<T>{w, 1, tile.pitch};
        batch_.products.add(padded(piece.lines), piece.dims, share.as_rows ? tile.cols : tile.rows, weights,
                            x, points.stride(), out, width_);
    }
};

template <typename T>
BackwardResult backward(const Call& call, const Tensor& grad_loss, const Tensor& saved_bytes, bool need_emb,
                        bool need_ref) {
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
        const auto fill = [&](const Tensor& like) { return at::full(like.sizes(), nan, like.options()); };
        return {need_emb ? fill(call.embeddings) : none(), need_ref ? fill(*call.ref_emb) : none()};
    }
    Batch<T> batch(call, refs, problem, layout, saved, true);

    // The rows' derivatives, with what comes from above.
    constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;
    const Tensor upstream = (grad_loss.scalar_type() == kType ? grad_loss : grad_loss.to(kType)).contiguous();
    const T* g = upstream.const_data_ptr<T>();
    const int last = batch.kernels.parts - 1;
    const bool each = problem.reduction == Reduction::kNone;
    std::vector<T> d(2 * n);
    T *d_neg = d.data(), *d_pos = d_neg + n;
    for_pieces(n, kRowPiece, n * 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const T up_pos = each                  ? g[batch.plan.row_order[i]]
                             : problem.return_sums ? g[0]
                                                   : *g * batch.stats.scale[0];
            const T up_neg = each ? up_pos : problem.return_sums ? g[last] : *g * batch.stats.scale[last];
            d_neg[i] = up_neg * batch.stats.d_neg[i];
            d_pos[i] = up_pos * batch.stats.d_pos[i];
        }
    });
    const RowWeights<T> rows = {batch.stats.neg_above,
                                batch.stats.pos_below,
                                batch.stats.neg_value,
                                batch.stats.pos_value,
                                d_neg,
                                d_pos};
    const auto like = [](const Tensor& points) { return at::empty(points.sizes(), points.options()); };
    const Tensor grad_emb = need_emb ? like(call.embeddings) : Tensor();
    const Tensor grad_ref = need_ref ? like(*call.ref_emb) : Tensor();
    if (need_ref) grad_ref.narrow(0, batch.m, grad_ref.size(0) - batch.m).zero_();  // they took no part
    if (batch.tiles.count() == 0) {
        if (need_emb) grad_emb.zero_();
        if (need_ref) grad_ref.zero_();
    } else if (need_emb || need_ref) {
        BackwardPass<T>(batch, rows, grad_emb, grad_ref).run();
    }
    return {need_emb ? grad_emb : none(), need_ref ? grad_ref : none()};
}

}  // namespace dml::cpu
