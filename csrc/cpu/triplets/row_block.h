// The similarities of a block of rows against all columns: what the ops on triplets work on.
//
// If the columns are the rows and all similarities fit, one row block holds them all and only half of it is
// computed. Products run inside tasks, in tiles that do not depend on the number of threads.
#pragma once

#include <ATen/CPUFunctions.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/kernels/triplet_kernels.h"
#include "cpu/pairs/batch.h"
#include "torch/triplet_ops.h"

namespace dml::cpu::triplet {

// Memory of a row block: of one that holds all pairs, of the others.
inline constexpr int64_t kWholeBytes = int64_t(64) << 20, kRowBlockBytes = int64_t(32) << 20;

template <typename T>
struct RowBlock {
    int64_t first, last;  // rows [first, last)
    T* s;                 // [rows, pitch]
    int64_t pitch;
    bool whole;  // whether it holds all rows against themselves

    int64_t rows() const { return last - first; }
    T* row(int64_t i) const { return s + (i - first) * pitch; }
};

// A list of columns, ascending.
struct Columns {
    const int32_t *first, *last;
    const int32_t* begin() const { return first; }
    const int32_t* end() const { return last; }
    int64_t size() const { return last - first; }
};

inline std::vector<int32_t> in_order(int64_t count) {
    std::vector<int32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    return order;
}

// The points, and their similarities one row block at a time.
template <typename T>
class Similarities {
    std::vector<int32_t> order_;  // of the points: unsorted

   public:
    // refs: the columns; without it the rows.
    Similarities(const Tensor& embeddings, const OptionalTensor& refs, c10::string_view similarity_name)
        : order_(in_order(std::max(embeddings.size(0), refs ? refs->size(0) : 0))),
          similarity(parse_similarity(similarity_name)),
          square(!refs),
          n(embeddings.size(0)),
          m(refs ? refs->size(0) : n),
          kernels(triplet_kernels<T>()),
          rows(embeddings, order_.data(), similarity),
          cols(square ? rows : ref_points_),
          ref_points_(refs ? *refs : embeddings.narrow(0, 0, 0), order_.data(), similarity) {
        rows.show(0, n);
        if (!square) cols.show(0, m);
    }

    const Similarity similarity;
    const bool square;
    const int64_t n, m;
    const TripletKernels<T>& kernels;
    PackedPoints<T> rows;
    PackedPoints<T>& cols;

    bool finite() const { return rows.finite && cols.finite; }

    // Calls visit(block) in the order of the rows.
    template <typename Visit>
    void for_each_row_block(const Visit& visit) const {
        if (n == 0 || m == 0) return;
        const int64_t pitch = row_stride<T>(m), row_bytes = pitch * int64_t(sizeof(T));
        const bool whole = square && padded(n) * row_bytes <= kWholeBytes + (kWholeBytes >> 4);
        const int64_t most = whole ? padded(n) : std::max<int64_t>(kRowBlockBytes / row_bytes / 16 * 16, 16);
        Tensor memory = at::empty({std::min(most, padded(n)) * pitch}, rows.options());
        for (int64_t first = 0; first < n; first += most) {
            const RowBlock<T> block{first, std::min(first + most, n), memory.template data_ptr<T>(), pitch,
                                    whole};
            fill(block);
            visit(block);
        }
    }

    // Calls run(i, similarities) for the rows of a row block, on all threads. work: steps per pair.
    template <typename Run>
    void for_each_row(const RowBlock<T>& block, int64_t work, const Run& run) const {
        const int64_t piece = std::clamp<int64_t>(kTaskWork / (m * work), 1, 64);
        for_pieces(block.rows(), piece, block.rows() * m * work, [&](int64_t from, int64_t to) {
            for (int64_t i = block.first + from; i < block.first + to; ++i) run(i, block.row(i));
        });
    }

   private:
    void fill(const RowBlock<T>& block) const {
        const int64_t most = std::max(n, m), side = most <= 512 ? 64 : most <= 2048 || !square ? 128 : 256;
        const int64_t wide = square ? side : 4 * side;
        const int64_t down = (block.rows() + side - 1) / side, across = (m + wide - 1) / wide;
        std::vector<std::pair<int32_t, int32_t>> tiles;
        for (int64_t i = 0; i < down; ++i) {
            for (int64_t j = block.whole ? i : 0; j < across; ++j) tiles.emplace_back(i, j);
        }
        const int64_t count = static_cast<int64_t>(tiles.size());
        for_tasks(count, count * side * wide * (rows.dim / 16 + 2), [&](int64_t k) {
            const int64_t i0 = block.first + tiles[k].first * side, j0 = tiles[k].second * wide;
            const int64_t i1 = std::min(i0 + side, block.last), j1 = std::min(j0 + wide, m);
            T* s = block.row(i0) + j0;
            T *x = rows.row(i0), *y = cols.row(j0);
            const int64_t lines = padded(i1 - i0), width = padded(j1 - j0);
            Tensor out = matrix(s, lines, width, block.pitch, 1);
            at::cpu::mm_out(out, matrix(x, lines, rows.dim, rows.stride(), 1),
                            matrix(y, rows.dim, width, 1, cols.stride()));
            if (similarity.euclidean) {
                kernels.distances(s, block.pitch, int(i1 - i0), int(j1 - j0), x, rows.stride(),
                                  rows.square(i0), y, cols.stride(), cols.square(j0), rows.dim);
            }
            if (block.whole && i0 != j0) kernels.transpose(s, block.row(j0) + i0, block.pitch, lines, width);
        });
    }

    PackedPoints<T> ref_points_;  // the columns where they are not the rows
};

// Similarities of labelled points: which columns are positives.
template <typename T>
class LabelledSimilarities : public Similarities<T> {
   public:
    explicit LabelledSimilarities(const TripletPoints& points)
        : LabelledSimilarities(points, References(points)) {}

    // The columns with row i's label; the one that is the same point, or -1.
    const Columns& same_label(int64_t i) const { return class_[i]; }
    int64_t self_col(int64_t i) const {
        return this->square ? i : self_.defined() ? self_.const_data_ptr<int64_t>()[i] : -1;
    }

   private:
    LabelledSimilarities(const TripletPoints& points, const References& refs)
        : Similarities<T>(points.embeddings, refs.points, points.similarity),
          plan_(3 * this->n + (this->square ? 0 : this->m)),
          class_(this->n) {
        const Tensor labels = points.labels.contiguous();
        const Tensor ref_labels = this->square ? labels : refs.labels->contiguous();
        make_plan(labels.const_data_ptr<int64_t>(), this->n, ref_labels.const_data_ptr<int64_t>(), this->m,
                  this->square, false, plan_.data());
        const Plan plan(plan_.data(), this->n, this->m, this->square);
        for_pieces(this->n, 16384, this->n, [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r)
                class_[plan.row_order[r]] = {plan.col_order + plan.pos_begin[r],
                                             plan.col_order + plan.pos_end[r]};
        });
        if (points.self_index) self_ = points.self_index->contiguous();
    }

    std::vector<int32_t> plan_;
    std::vector<Columns> class_;  // [n]
    Tensor self_;                 // [n]
};

}  // namespace dml::cpu::triplet
