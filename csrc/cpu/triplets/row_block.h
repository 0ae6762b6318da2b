// The similarities of a strip of rows against all columns at a time: what the ops on triplets work on.
//
// Where the rows are their own columns and all similarities fit, they are one strip, of which half is
// computed. Products run inside tasks, in blocks that do not depend on the number of threads.
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

// Memory of the similarities of a strip: of all pairs where half of them need no product, else.
inline constexpr int64_t kWholeBytes = int64_t(64) << 20, kStripBytes = int64_t(32) << 20;

template <typename T>
struct Strip {
    int64_t first, last;  // rows
    T* s;                 // [rows, pitch]
    int64_t pitch;
    bool whole;  // all rows against themselves

    int64_t rows() const { return last - first; }
    T* row(int64_t i) const { return s + (i - first) * pitch; }
};

// Columns, ascending.
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

// The points, and the strips of their similarities.
template <typename T>
class Similarities {
    std::vector<int32_t> order_;  // of the points: as they come

   public:
    // refs: the columns that take part, or none: the rows themselves.
    Similarities(const Tensor& embeddings, const OptionalTensor& refs, c10::string_view how)
        : order_(in_order(std::max(embeddings.size(0), refs ? refs->size(0) : 0))),
          similarity(parse_similarity(how)),
          square(!refs),
          n(embeddings.size(0)),
          m(refs ? refs->size(0) : n),
          kernels(triplet_kernels<T>()),
          rows(embeddings, order_.data(), similarity),
          cols(square ? rows : other_),
          other_(refs ? *refs : embeddings.narrow(0, 0, 0), order_.data(), similarity) {
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

    // Calls visit(strip), in the order of the rows.
    template <typename Visit>
    void for_each_strip(const Visit& visit) const {
        if (n == 0 || m == 0) return;
        const int64_t pitch = row_stride<T>(m), row_bytes = pitch * int64_t(sizeof(T));
        const bool whole = square && padded(n) * row_bytes <= kWholeBytes + (kWholeBytes >> 4);
        const int64_t most = whole ? padded(n) : std::max<int64_t>(kStripBytes / row_bytes / 16 * 16, 16);
        Tensor memory = at::empty({std::min(most, padded(n)) * pitch}, rows.options());
        for (int64_t first = 0; first < n; first += most) {
            const Strip<T> strip{first, std::min(first + most, n), memory.template data_ptr<T>(), pitch,
                                 whole};
            fill(strip);
            visit(strip);
        }
    }

    // Calls run(i, similarities) for the rows of a strip, on all threads. `work`: steps for each pair.
    template <typename Run>
    void for_each_row(const Strip<T>& strip, int64_t work, const Run& run) const {
        const int64_t piece = std::clamp<int64_t>(kTaskWork / (m * work), 1, 64);
        for_pieces(strip.rows(), piece, strip.rows() * m * work, [&](int64_t from, int64_t to) {
            for (int64_t i = strip.first + from; i < strip.first + to; ++i) run(i, strip.row(i));
        });
    }

   private:
    void fill(const Strip<T>& strip) const {
        const int64_t most = std::max(n, m), side = most <= 512 ? 64 : most <= 2048 || !square ? 128 : 256;
        const int64_t wide = square ? side : 4 * side;
        const int64_t down = (strip.rows() + side - 1) / side, across = (m + wide - 1) / wide;
        std::vector<std::pair<int32_t, int32_t>> blocks;
        for (int64_t i = 0; i < down; ++i) {
            for (int64_t j = strip.whole ? i : 0; j < across; ++j) blocks.emplace_back(i, j);
        }
        const int64_t count = static_cast<int64_t>(blocks.size());
        for_tasks(count, count * side * wide * (rows.dim / 16 + 2), [&](int64_t k) {
            const int64_t i0 = strip.first + blocks[k].first * side, j0 = blocks[k].second * wide;
            const int64_t i1 = std::min(i0 + side, strip.last), j1 = std::min(j0 + wide, m);
            T* s = strip.row(i0) + j0;
            T *x = rows.row(i0), *y = cols.row(j0);
            const int64_t lines = padded(i1 - i0), width = padded(j1 - j0);
            Tensor out = matrix(s, lines, width, strip.pitch, 1);
            at::cpu::mm_out(out, matrix(x, lines, rows.dim, rows.stride(), 1),
                            matrix(y, rows.dim, width, 1, cols.stride()));
            if (similarity.euclidean) {
                kernels.distances(s, strip.pitch, int(i1 - i0), int(j1 - j0), x, rows.stride(),
                                  rows.square(i0), y, cols.stride(), cols.square(j0), rows.dim);
            }
            if (strip.whole && i0 != j0) kernels.transpose(s, strip.row(j0) + i0, strip.pitch, lines, width);
        });
    }

    PackedPoints<T> other_;  // the columns where they are not the rows
};

// Likewise, and who is whose positive.
template <typename T>
class LabelledSimilarities : public Similarities<T> {
   public:
    explicit LabelledSimilarities(const TripletPoints& of) : LabelledSimilarities(of, References(of)) {}

    // The columns of row i's label, and its own among them, or -1.
    const Columns& same_label(int64_t i) const { return class_[i]; }
    int64_t own(int64_t i) const {
        return this->square ? i : self_.defined() ? self_.const_data_ptr<int64_t>()[i] : -1;
    }

   private:
    LabelledSimilarities(const TripletPoints& of, const References& refs)
        : Similarities<T>(of.embeddings, refs.points, of.similarity),
          plan_(Plan::numel(this->n, this->m, this->square)),
          class_(this->n) {
        const Tensor labels = of.labels.contiguous();
        const Tensor ref_labels = this->square ? labels : refs.labels->contiguous();
        make_plan(labels.const_data_ptr<int64_t>(), this->n, ref_labels.const_data_ptr<int64_t>(), this->m,
                  this->square, plan_.data());
        const Plan plan(plan_.data(), this->n, this->square);
        for_pieces(this->n, 16384, this->n, [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r)
                class_[plan.row_order[r]] = {plan.col_order + plan.pos_begin[r],
                                             plan.col_order + plan.pos_end[r]};
        });
        if (of.self_index) self_ = of.self_index->contiguous();
    }

    std::vector<int32_t> plan_;
    std::vector<Columns> class_;  // [n]
    Tensor self_;                 // [n]
};

}  // namespace dml::cpu::triplet
