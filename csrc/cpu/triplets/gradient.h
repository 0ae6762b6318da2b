// The gradient of the points from the weights of row blocks. One task owns a sum, and its order is fixed.
//
// If a row block holds all pairs, the gradient is one product with W + W^T.
#pragma once

#include <ATen/ops/zeros.h>

#include <numeric>
#include <vector>

#include "cpu/triplets/row_block.h"

namespace dml::cpu::triplet {

// Columns that a task multiplies for the gradient of the rows, the part of them that one product adds up so
// that it stays in cache, and dimensions of the gradient that one task makes.
inline constexpr int64_t kDepth = 4096, kSlice = 512, kPanel = 256;

// A tile of W + W^T with a smaller share of non-zeros is multiplied weight by weight. Above it the dense
// product is faster: it multiplies zeros, but uses the cache better.
inline constexpr double kSparseBlock = 0.3;

// out = a b, or out += a b; a [lines, depth], b [depth, wide], each with its strides.
template <typename T>
struct Operand {
    T* data;
    int64_t row, column;
};
template <typename T>
void multiply(T* out, int64_t pitch, int64_t lines, int64_t depth, int64_t wide, const Operand<T>& a,
              const Operand<T>& b, bool add) {
    Tensor sum = matrix(out, lines, wide, pitch, 1);
    for (int64_t k = 0; k < depth; k += kSlice) {
        const int64_t here = std::min(kSlice, depth - k);
        const Tensor left = matrix(a.data + k * a.column, lines, here, a.row, a.column);
        const Tensor right = matrix(b.data + k * b.row, here, wide, b.row, b.column);
        if (add || k > 0) {
            at::cpu::addmm_out(sum, sum, left, right, 1, 1);
        } else {
            at::cpu::mm_out(sum, left, right);
        }
    }
}

// The weights of a row block as lists, one per row.
template <typename T>
struct WeightLists {
    std::vector<int64_t> start;  // [rows + 1] where a row's space starts
    std::vector<int64_t> count;  // [rows] weights of a row
    std::vector<int32_t> column;
    std::vector<T> weight;
};

// The non-zero weights of all pairs, tile by tile.
template <typename T>
class Nonzeros {
   public:
    Nonzeros(int64_t lines, int64_t side)
        : side(side),
          lines_(lines),
          blocks_((lines + side - 1) / side),
          words_((side + 63) / 64),
          bits_(at::empty({blocks_ * lines * words_}, at::kLong)),
          counts_(blocks_ * blocks_) {}

    const int64_t side;

    // Finds those of the tile with first row i and first column j.
    void find(const TripletKernels<T>& kernels, const RowBlock<T>& block, int64_t i, int64_t j) {
        const int64_t rows = std::min(side, lines_ - i), cols = std::min(side, lines_ - j);
        const int64_t count =
            kernels.find_nonzeros(block.s + i * block.pitch + j, block.pitch, rows, cols, bits(i, j));
        counts_[i / side * blocks_ + j / side] = count < kSparseBlock * (rows * cols) ? count : kDense;
    }
    bool dense(int64_t i, int64_t j) const { return count(i, j) == kDense; }
    bool empty(int64_t i, int64_t j) const { return count(i, j) == 0; }
    uint64_t* bits(int64_t i, int64_t j) const {
        // The last tile of a row may have fewer words a line.
        return reinterpret_cast<uint64_t*>(bits_.data_ptr<int64_t>()) + (j / side * lines_ + i) * words_;
    }

   private:
    static constexpr int64_t kDense = -1;
    int64_t count(int64_t i, int64_t j) const { return counts_[i / side * blocks_ + j / side]; }

    const int64_t lines_, blocks_, words_;
    const Tensor bits_;
    std::vector<int64_t> counts_;  // [tiles, tiles]
};

// Sums the products of weights and points over row blocks, and returns them as the gradient of the
// embeddings.
template <typename T>
class RowBlockGradient {
   public:
    RowBlockGradient(const Similarities<T>& similarities, bool columns)
        : similarities_(similarities),
          columns_(columns || similarities.square),
          width_(similarities.rows.padded_width()) {
        rows_ = at::zeros({padded(similarities.n), width_}, similarities.rows.options());
        cols_ = similarities.square
                    ? rows_
                    : at::zeros({columns ? padded(similarities.m) : 0, width_}, similarities.rows.options());
    }

    void add(const RowBlock<T>& block) {
        if (block.whole) return add_whole(block);
        add_rows(block);
        if (columns_) add_columns(block);
    }

    void add(const RowBlock<T>& block, const WeightLists<T>& lists) {
        add_listed_rows(block, lists);
        if (columns_) add_listed_columns(block, lists);
    }

    Tensor of_rows() const { return finish(rows_, similarities_.rows, similarities_.n, similarities_.n); }
    // capacity: rows of ref_emb, of which some may not be valid.
    Tensor of_cols(int64_t capacity) const {
        return finish(cols_, similarities_.cols, similarities_.m, capacity);
    }

   private:
    Tensor finish(const Tensor& sums, const PackedPoints<T>& points, int64_t count, int64_t capacity) const {
        Tensor out = at::empty({capacity, points.dim}, points.options());
        unpack(sums.const_data_ptr<T>(), points, 0, count, out);
        if (capacity > count) out.narrow(0, count, capacity - count).zero_();
        return out;
    }

    int64_t panels() const { return (width_ + kPanel - 1) / kPanel; }

    // Calls product(first line, first dimension of a panel, its width) as tasks, for blocks of `side` lines
    // with `depth` weights a line.
    template <typename Product>
    void for_products(int64_t lines, int64_t side, int64_t depth, const Product& product) const {
        const int64_t blocks = (lines + side - 1) / side;
        for_tasks(blocks * panels(), lines * depth * (width_ / 16 + 1), [&](int64_t k) {
            const int64_t d = k % panels() * kPanel;
            product(k / panels() * side, d, std::min(kPanel, width_ - d));
        });
    }

    // W + W^T, in place, times the points.
    void add_whole(const RowBlock<T>& block) {
        const int64_t n = similarities_.n, lines = padded(n), side = n <= 1024 ? 64 : kMostSide,
                      pitch = block.pitch;
        const int64_t blocks = (lines + side - 1) / side;
        Nonzeros<T> nonzeros(lines, side);
        for_tasks(blocks * (blocks + 1) / 2, lines * lines / 2, [&](int64_t k) {
            int64_t i = 0;
            while (k >= blocks - i) k -= blocks - i++;
            const int64_t i0 = i * side, j0 = (i + k) * side;
            similarities_.kernels.add_transposed(block.s + i0 * pitch + j0, block.s + j0 * pitch + i0, pitch,
                                                 std::min(side, lines - i0), std::min(side, lines - j0));
            nonzeros.find(similarities_.kernels, block, i0, j0);
            if (i0 != j0) nonzeros.find(similarities_.kernels, block, j0, i0);
        });
        for_products(lines, side, lines,
                     [&](int64_t i, int64_t d, int64_t wide) { add_tiles(block, nonzeros, i, d, wide); });
    }

    // The tiles of a block of rows in order; adjacent dense ones as one product.
    void add_tiles(const RowBlock<T>& block, const Nonzeros<T>& nonzeros, int64_t i, int64_t d,
                   int64_t wide) {
        const int64_t lines = padded(similarities_.n), side = nonzeros.side, here = std::min(side, lines - i);
        T* out = rows_.template data_ptr<T>() + i * width_ + d;
        for (int64_t j = 0, to; j < lines; j = to) {
            to = std::min(j + side, lines);
            T *w = block.s + i * block.pitch + j, *points = similarities_.rows.row(j) + d;
            if (nonzeros.dense(i, j)) {
                while (to < lines && nonzeros.dense(i, to)) to = std::min(to + side, lines);
                multiply<T>(out, width_, here, to - j, wide, {w, block.pitch, 1},
                            {points, similarities_.rows.stride(), 1}, true);
            } else if (!nonzeros.empty(i, j)) {
                similarities_.kernels.add_nonzeros(w, block.pitch, here, to - j, nonzeros.bits(i, j), points,
                                                   similarities_.rows.stride(), wide, out, width_);
            }
        }
    }

    // There are few rows, so columns are cut too, and the parts are added in order.
    void add_rows(const RowBlock<T>& block) {
        const int64_t lines = padded(block.rows()), m = padded(similarities_.m);
        const int64_t cuts = (m + kDepth - 1) / kDepth;
        if (parts_.size() < static_cast<size_t>(cuts * lines * width_)) parts_.resize(cuts * lines * width_);
        for_products(cuts * lines, lines, kDepth, [&](int64_t at, int64_t d, int64_t wide) {
            const int64_t cut = at / lines, j = cut * kDepth, depth = std::min(kDepth, m - j);
            multiply<T>(parts_.data() + at * width_ + d, width_, lines, depth, wide,
                        {block.s + j, block.pitch, 1},
                        {similarities_.cols.row(j) + d, similarities_.cols.stride(), 1}, false);
        });
        T* out = rows_.template data_ptr<T>() + block.first * width_;
        for_pieces(lines * width_, 4096, cuts * lines * width_, [&](int64_t from, int64_t to) {
            for (int64_t cut = 0; cut < cuts; ++cut) {
                const T* part = parts_.data() + cut * lines * width_;
#pragma omp simd
                for (int64_t k = from; k < to; ++k) out[k] += part[k];
            }
        });
    }

    void add_columns(const RowBlock<T>& block) {
        const int64_t lines = padded(block.rows()), m = padded(similarities_.m), side = 2 * kMostSide;
        T* out = cols_.template data_ptr<T>();
        for_products(m, side, lines, [&](int64_t j, int64_t d, int64_t wide) {
            multiply<T>(out + j * width_ + d, width_, std::min(side, m - j), lines, wide,
                        {block.s + j, 1, block.pitch},
                        {similarities_.rows.row(block.first) + d, similarities_.rows.stride(), 1}, true);
        });
    }

    void add_listed_rows(const RowBlock<T>& block, const WeightLists<T>& lists) {
        T* out = rows_.template data_ptr<T>() + block.first * width_;
        const int64_t work = static_cast<int64_t>(lists.weight.size()) * (width_ / 16 + 1);
        for_pieces(block.rows(), 16, work, [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r) {
                const int64_t at = lists.start[r];
                similarities_.kernels.add_points(lists.weight.data() + at, lists.column.data() + at,
                                                 lists.count[r], similarities_.cols.row(0),
                                                 similarities_.cols.stride(), width_, out + r * width_);
            }
        });
    }

    // The weights sorted by column, then row. A column is summed by the task in whose piece it starts.
    void add_listed_columns(const RowBlock<T>& block, const WeightLists<T>& lists) {
        std::vector<int64_t> at(block.rows() + 1, 0);
        std::partial_sum(lists.count.begin(), lists.count.end(), at.begin() + 1);
        const int64_t count = at.back();
        std::vector<int64_t> column(count);
        std::vector<int32_t> row(count), order(count);
        std::vector<T> weight(count);
        for_pieces(block.rows(), 64, count * 4, [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r) {
                for (int64_t k = 0; k < lists.count[r]; ++k) {
                    column[at[r] + k] = lists.column[lists.start[r] + k];
                    weight[at[r] + k] = lists.weight[lists.start[r] + k];
                    row[at[r] + k] = static_cast<int32_t>(block.first + r);
                }
            }
        });
        sort_by_label(column.data(), count, order.data());
        T* out = cols_.template data_ptr<T>();
        const auto column_at = [&](int64_t k) { return column[order[k]]; };
        for_pieces(count, 256, count * (width_ / 16 + 1), [&](int64_t from, int64_t to) {
            std::vector<T> weights;
            std::vector<int32_t> index;
            while (from > 0 && from < to && column_at(from) == column_at(from - 1)) ++from;
            while (from < to) {
                const int64_t j = column_at(from);
                weights.clear();
                index.clear();
                for (; from < count && column_at(from) == j; ++from) {
                    weights.push_back(weight[order[from]]);
                    index.push_back(row[order[from]]);
                }
                similarities_.kernels.add_points(
                    weights.data(), index.data(), static_cast<int64_t>(index.size()),
                    similarities_.rows.row(0), similarities_.rows.stride(), width_, out + j * width_);
            }
        });
    }

    const Similarities<T>& similarities_;
    const bool columns_;
    const int64_t width_;
    Tensor rows_, cols_;  // [padded(n), width], [padded(m), width]; the same tensor where square
    std::vector<T> parts_;
};

}  // namespace dml::cpu::triplet
