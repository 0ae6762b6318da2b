// The ops on triplets: a strip of rows against all columns at a time, whose similarities are then at hand for
// everything that a row's triplets ask of them, and turn into the weights of its gradient in place. So no
// triplet is listed, and memory is that of a strip.
//
// Where the rows are their own columns and all similarities fit, they are one strip: half of them is
// computed, and the gradient is one product, with W + W^T. Products run inside tasks, in blocks that do not
// depend on the number of threads, and every sum has one owner and one order.
#include <ATen/CPUFunctions.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "../triplet_ops.h"
#include "pair_loss.h"
#include "triplet_kernels.h"

namespace dml::cpu {
namespace {

// Memory of the similarities of a strip: of all pairs where half of them need no product, else.
constexpr int64_t kWholeBytes = int64_t(64) << 20, kStripBytes = int64_t(32) << 20;

// Rows whose weights fill less than this share of a strip are multiplied weight by weight.
constexpr double kSparseWeights = 0.05;

// Columns over which one task adds up, those that one product takes, whose points stay in the second-level
// cache, and dimensions of the gradient that one task makes.
constexpr int64_t kDepth = 4096, kSlice = 512, kPanel = 256;

// out = a b, or out += a b; a [lines, depth], b [depth, wide], each with the distances of its rows and
// columns.
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

// The points, who is whose positive, and the strips of their similarities.
template <typename T>
class Similarities {
    std::vector<int32_t> order_;  // of the points: as they come

   public:
    explicit Similarities(const TripletPoints& of) : Similarities(of, References(of.call())) {
        const Tensor labels = of.labels.contiguous();
        const Tensor ref_labels = square ? labels : References(of.call()).labels->contiguous();
        make_plan(labels.const_data_ptr<int64_t>(), n, ref_labels.const_data_ptr<int64_t>(), m, square,
                  plan_.data());
        const Plan plan(plan_.data(), n, square);
        for_pieces(n, 16384, n, [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r)
                class_[plan.row_order[r]] = {plan.col_order + plan.pos_begin[r],
                                             plan.col_order + plan.pos_end[r]};
        });
        if (of.self_ref) self_ = of.self_ref->contiguous();
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
    // The columns of row i's label, and its own among them, or -1.
    const Columns& same_label(int64_t i) const { return class_[i]; }
    int64_t own(int64_t i) const {
        return square ? i : self_.defined() ? self_.const_data_ptr<int64_t>()[i] : -1;
    }

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
    Similarities(const TripletPoints& of, const References& refs)
        : order_(in_order(std::max(of.embeddings.size(0), refs.count(of.call())))),
          similarity(parse_similarity(of.similarity)),
          square(!of.ref_emb),
          n(of.embeddings.size(0)),
          m(refs.count(of.call())),
          kernels(triplet_kernels<T>()),
          rows(of.embeddings, order_.data(), similarity),
          cols(square ? rows : other_),
          other_(square ? of.embeddings.narrow(0, 0, 0) : *refs.points, order_.data(), similarity),
          plan_(Plan::numel(n, m, square)),
          class_(n) {}

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
    std::vector<int32_t> plan_;
    std::vector<Columns> class_;  // [n]
    Tensor self_;                 // [n]
};

// ---- the gradient -----------------------------------------------------------------------------------------

// The weights of a strip's rows, one list a row.
template <typename T>
struct WeightLists {
    std::vector<int64_t> start;  // [rows + 1] of a row's space
    std::vector<int64_t> count;  // [rows]
    std::vector<int32_t> column;
    std::vector<T> weight;
};

// Adds up what strips of weights make of the points, and gives it back as the gradient of the embeddings.
template <typename T>
class Gradient {
   public:
    Gradient(const Similarities<T>& of, bool columns)
        : of_(of), columns_(columns || of.square), width_(of.rows.padded_width()) {
        rows_ = at::zeros({padded(of.n), width_}, of.rows.options());
        cols_ = of.square ? rows_ : at::zeros({columns ? padded(of.m) : 0, width_}, of.rows.options());
    }

    void add(const Strip<T>& strip) {
        if (strip.whole) return add_whole(strip);
        add_rows(strip);
        if (columns_) add_columns(strip);
    }

    void add(const Strip<T>& strip, const WeightLists<T>& lists) {
        add_listed_rows(strip, lists);
        if (columns_) add_listed_columns(strip, lists);
    }

    Tensor of_rows() const { return finish(rows_, of_.rows, of_.n, of_.n); }
    // capacity: of the references, of which not all may have been there.
    Tensor of_cols(int64_t capacity) const { return finish(cols_, of_.cols, of_.m, capacity); }

   private:
    Tensor finish(const Tensor& sums, const PackedPoints<T>& points, int64_t count, int64_t capacity) const {
        Tensor out = at::empty({capacity, points.dim}, points.options());
        unpack(sums.const_data_ptr<T>(), points, 0, count, out);
        if (capacity > count) out.narrow(0, count, capacity - count).zero_();
        return out;
    }

    int64_t panels() const { return (width_ + kPanel - 1) / kPanel; }

    // Calls product(row block, panel's first dimension, its width) as tasks, whose work is that of `depth`
    // weights a row.
    template <typename Product>
    void for_products(int64_t lines, int64_t side, int64_t depth, const Product& product) const {
        const int64_t blocks = (lines + side - 1) / side;
        for_tasks(blocks * panels(), lines * depth * (width_ / 16 + 1), [&](int64_t k) {
            const int64_t d = k % panels() * kPanel;
            product(k / panels() * side, d, std::min(kPanel, width_ - d));
        });
    }

    // W + W^T, in place, times the points.
    void add_whole(const Strip<T>& strip) {
        const int64_t n = of_.n, lines = padded(n), side = n <= 1024 ? 64 : kMostSide, pitch = strip.pitch;
        const int64_t blocks = (lines + side - 1) / side;
        for_tasks(blocks * (blocks + 1) / 2, lines * lines / 2, [&](int64_t k) {
            int64_t i = 0;
            while (k >= blocks - i) k -= blocks - i++;
            const int64_t i0 = i * side, j0 = (i + k) * side;
            of_.kernels.add_transposed(strip.s + i0 * pitch + j0, strip.s + j0 * pitch + i0, pitch,
                                       std::min(side, lines - i0), std::min(side, lines - j0));
        });
        T* out = rows_.template data_ptr<T>();
        for_products(lines, side, lines, [&](int64_t i, int64_t d, int64_t wide) {
            const int64_t here = std::min(side, lines - i);
            multiply<T>(out + i * width_ + d, width_, here, lines, wide, {strip.s + i * pitch, pitch, 1},
                        {of_.rows.row(0) + d, of_.rows.stride(), 1}, false);
        });
    }

    // Rows are few beside the columns: these are cut as well, and the parts folded in their order.
    void add_rows(const Strip<T>& strip) {
        const int64_t lines = padded(strip.rows()), m = padded(of_.m);
        const int64_t cuts = (m + kDepth - 1) / kDepth;
        if (parts_.size() < static_cast<size_t>(cuts * lines * width_)) parts_.resize(cuts * lines * width_);
        for_products(cuts * lines, lines, kDepth, [&](int64_t at, int64_t d, int64_t wide) {
            const int64_t cut = at / lines, j = cut * kDepth, depth = std::min(kDepth, m - j);
            multiply<T>(parts_.data() + at * width_ + d, width_, lines, depth, wide,
                        {strip.s + j, strip.pitch, 1}, {of_.cols.row(j) + d, of_.cols.stride(), 1}, false);
        });
        T* out = rows_.template data_ptr<T>() + strip.first * width_;
        for_pieces(lines * width_, 4096, cuts * lines * width_, [&](int64_t from, int64_t to) {
            for (int64_t cut = 0; cut < cuts; ++cut) {
                const T* part = parts_.data() + cut * lines * width_;
#pragma omp simd
                for (int64_t k = from; k < to; ++k) out[k] += part[k];
            }
        });
    }

    void add_columns(const Strip<T>& strip) {
        const int64_t lines = padded(strip.rows()), m = padded(of_.m), side = 2 * kMostSide;
        T* out = cols_.template data_ptr<T>();
        for_products(m, side, lines, [&](int64_t j, int64_t d, int64_t wide) {
            multiply<T>(out + j * width_ + d, width_, std::min(side, m - j), lines, wide,
                        {strip.s + j, 1, strip.pitch}, {of_.rows.row(strip.first) + d, of_.rows.stride(), 1},
                        true);
        });
    }

    void add_listed_rows(const Strip<T>& strip, const WeightLists<T>& lists) {
        T* out = rows_.template data_ptr<T>() + strip.first * width_;
        const int64_t work = static_cast<int64_t>(lists.weight.size()) * (width_ / 16 + 1);
        for_pieces(strip.rows(), 16, work, [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r) {
                const int64_t at = lists.start[r];
                of_.kernels.add_points(lists.weight.data() + at, lists.column.data() + at, lists.count[r],
                                       of_.cols.row(0), of_.cols.stride(), width_, out + r * width_);
            }
        });
    }

    // The weights in the order of their columns, then rows. A column's are added up by the task in whose
    // piece they begin.
    void add_listed_columns(const Strip<T>& strip, const WeightLists<T>& lists) {
        std::vector<int64_t> at(strip.rows() + 1, 0);
        std::partial_sum(lists.count.begin(), lists.count.end(), at.begin() + 1);
        const int64_t count = at.back();
        std::vector<int64_t> column(count);
        std::vector<int32_t> row(count), order(count);
        std::vector<T> weight(count);
        for_pieces(strip.rows(), 64, count * 4, [&](int64_t from, int64_t to) {
            for (int64_t r = from; r < to; ++r) {
                for (int64_t k = 0; k < lists.count[r]; ++k) {
                    column[at[r] + k] = lists.column[lists.start[r] + k];
                    weight[at[r] + k] = lists.weight[lists.start[r] + k];
                    row[at[r] + k] = static_cast<int32_t>(strip.first + r);
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
                of_.kernels.add_points(weights.data(), index.data(), static_cast<int64_t>(index.size()),
                                       of_.rows.row(0), of_.rows.stride(), width_, out + j * width_);
            }
        });
    }

    const Similarities<T>& of_;
    const bool columns_;
    const int64_t width_;
    Tensor rows_, cols_;  // [., width]; the same where square
    std::vector<T> parts_;
};

// ---- one row ----------------------------------------------------------------------------------------------

// One negative for each number in (0, 1), by the weights of their distances.
template <typename T>
class Draw {
   public:
    void prepare(const TripletKernels<T>& kernels, const T* s, int64_t m, const TripletParams<T>& params) {
        m_ = m;
        weights_.resize(m);
        const int64_t blocks = (m + kDrawBlock - 1) / kDrawBlock;
        below_.assign(blocks + 1, 0.0);
        kernels.draw_weights(s, m, params, weights_.data(), below_.data() + 1);
        std::partial_sum(below_.begin(), below_.end(), below_.begin());
    }
    int64_t column(double u) const {
        const double target = u * below_.back();
        if (!(below_.back() > 0)) return -1;
        // The first block that passes the target; blocks without weight do not.
        const auto end = std::upper_bound(below_.begin() + 1, below_.end() - 1, target);
        int64_t block = end - (below_.begin() + 1);
        while (below_[block + 1] == below_[block]) --block;  // only where rounding has hidden the last
        double sum = below_[block];
        int64_t found = -1;
        for (int64_t j = block * kDrawBlock; j < std::min((block + 1) * kDrawBlock, m_); ++j) {
            if (!(weights_[j] > T(0))) continue;
            found = j;
            sum += static_cast<double>(weights_[j]);
            if (sum > target) break;
        }
        return found;
    }

   private:
    int64_t m_ = 0;
    std::vector<T> weights_;     // [m]
    std::vector<double> below_;  // [blocks + 1] the weight of all blocks before
};

// The hardest negative farther than a positive: by a look at all, or in sorted ones where many ask.
template <typename T>
class Semihard {
   public:
    void prepare(const TripletKernels<T>& kernels, const T* s, int64_t m, int64_t askers) {
        kernels_ = &kernels;
        s_ = s;
        m_ = m;
        sorted_.clear();
        is_sorted_ = askers > 256;
        if (!is_sorted_) return;
        for (int64_t j = 0; j < m; ++j) {
            if (!std::isnan(s[j])) sorted_.emplace_back(-s[j], static_cast<int32_t>(j));
        }
        std::sort(sorted_.begin(), sorted_.end());
    }
    int64_t column(T d_pos) const {
        if (!is_sorted_) return kernels_->largest(s_, m_, -d_pos);
        const auto farther = [](T d, const std::pair<T, int32_t>& negative) { return d < negative.first; };
        const auto at = std::upper_bound(sorted_.begin(), sorted_.end(), d_pos, farther);
        return at == sorted_.end() ? -1 : at->second;
    }

   private:
    const TripletKernels<T>* kernels_ = nullptr;
    const T* s_ = nullptr;
    int64_t m_ = 0;
    bool is_sorted_ = false;
    std::vector<std::pair<T, int32_t>> sorted_;  // distance, column
};

// What a thread needs for a row, kept from row to row.
template <typename T>
struct RowScratch {
    std::vector<int32_t> columns;  // of the chosen positives
    std::vector<T> distances;      // likewise, then padding
    std::vector<std::pair<T, int32_t>> sorted;
    std::vector<double> prefix, slope;
    std::vector<int32_t> steps;
    Draw<T> draw;
    Semihard<T> semihard;

    static RowScratch& mine() {
        static thread_local RowScratch scratch;
        return scratch;
    }
};

// A row's positives and negatives as a selection asks for them.
template <typename T>
class RowPairs {
   public:
    // Takes the positives out of `s`: they, and negatives that are not allowed, become NaN.
    RowPairs(const Similarities<T>& of, const TripletParams<T>& params, int64_t i, T* s)
        : of_(of), params_(params), i_(i), s_(s), scratch_(RowScratch<T>::mine()) {
        auto& columns = scratch_.columns;
        auto& distances = scratch_.distances;
        columns.clear();
        distances.clear();
        const int64_t own = of.own(i);
        for (const int32_t j : of.same_label(i)) {
            const T d = -s[j];
            s[j] = std::numeric_limits<T>::quiet_NaN();
            if (j == own || !params.positive_allowed(d)) continue;
            columns.push_back(j);
            distances.push_back(d);
        }
        negatives_ = of.m - of.same_label(i).size();
        const bool bounded = params.neg_low > -infinity<T>() || params.neg_high < infinity<T>();
        if (bounded) negatives_ = of.kernels.keep_allowed(s, of.m, params);
    }

    int64_t positives() const { return static_cast<int64_t>(scratch_.columns.size()); }
    int64_t negatives() const { return negatives_; }
    int64_t column(int64_t k) const { return scratch_.columns[k]; }
    T distance(int64_t k) const { return scratch_.distances[k]; }
    RowScratch<T>& scratch() const { return scratch_; }

    // The number of the positive that is farthest or nearest, the first among equals, or -1.
    int64_t extreme_positive(Selection which) const {
        const auto& d = scratch_.distances;
        int64_t best = d.empty() ? -1 : 0;
        for (int64_t k = 1; k < positives(); ++k) {
            if (which == Selection::kHardest ? d[k] > d[best] : d[k] < d[best]) best = k;
        }
        return best;
    }
    void choose_positives(Selection which) {
        if (which == Selection::kAll || positives() == 0) return;
        const int64_t best = extreme_positive(which);
        scratch_.columns = {scratch_.columns[best]};
        scratch_.distances = {scratch_.distances[best]};
    }

    // Before negative(): `askers` of them will be asked for.
    void prepare(Selection which, int64_t askers, uint64_t seed) {
        if (askers == 0) return;
        seed_ = seed;
        if (which == Selection::kHardest) fixed_ = of_.kernels.largest(s_, of_.m, infinity<T>());
        if (which == Selection::kEasiest) fixed_ = of_.kernels.smallest(s_, of_.m);
        if (which == Selection::kSemihard) scratch_.semihard.prepare(of_.kernels, s_, of_.m, askers);
        if (which == Selection::kDrawn) scratch_.draw.prepare(of_.kernels, s_, of_.m, params_);
    }
    // The column of the negative for the k-th positive, at distance d_pos; or -1.
    int64_t negative(Selection which, int64_t k, T d_pos) const {
        if (which == Selection::kSemihard) return scratch_.semihard.column(d_pos);
        if (which == Selection::kDrawn) return scratch_.draw.column(uniform_draw(seed_, i_, k));
        return fixed_;
    }

   private:
    const Similarities<T>& of_;
    const TripletParams<T>& params_;
    const int64_t i_;
    T* const s_;
    RowScratch<T>& scratch_;
    int64_t negatives_ = 0, fixed_ = -1;
    uint64_t seed_ = 0;
};

// ---- the loss ---------------------------------------------------------------------------------------------

template <typename T>
class TripletLoss {
   public:
    TripletLoss(const Similarities<T>& of, TripletTerm term, TripletChoice choice,
                const std::array<double, kTripletParams>& params, const T* beta, uint64_t seed, bool save)
        : of_(of),
          term_(term),
          choice_(choice),
          params_(params.data()),
          beta_(beta),
          seed_(seed),
          save_(save) {
        const auto options = of.rows.options();
        sums = at::zeros({of.n}, options);
        counts = at::zeros({of.n, 2}, options.dtype(at::kLong));
        grad_beta = at::zeros({beta && save ? of.n : 0}, options);
    }

    Tensor sums, counts, grad_beta;

    void run(Gradient<T>* gradient) {
        of_.for_each_strip([&](const Strip<T>& strip) {
            const bool listed = gradient && plan_lists(strip);
            of_.for_each_row(strip, choice_.positives == Selection::kAll ? 4 : 1, [&](int64_t i, T* s) {
                row(i, s, listed ? &lists_ : nullptr, i - strip.first);
            });
            if (!gradient) return;
            if (listed) {
                gradient->add(strip, lists_);
            } else {
                gradient->add(strip);
            }
        });
    }

   private:
    int64_t most_weights(int64_t i) const {
        const int64_t positives = of_.same_label(i).size();
        return 2 * (choice_.positives == Selection::kAll ? positives : std::min<int64_t>(positives, 1));
    }

    // Space for the weights of a strip as lists, if they are few.
    bool plan_lists(const Strip<T>& strip) {
        if (choice_.negatives == Selection::kAll) return false;
        lists_.start.assign(strip.rows() + 1, 0);
        for (int64_t r = 0; r < strip.rows(); ++r)
            lists_.start[r + 1] = lists_.start[r] + most_weights(strip.first + r);
        const int64_t most = lists_.start.back();
        if (static_cast<double>(most) > kSparseWeights * static_cast<double>(strip.rows() * of_.m))
            return false;
        lists_.count.assign(strip.rows(), 0);
        lists_.column.resize(most);
        lists_.weight.resize(most);
        return true;
    }

    void row(int64_t i, T* s, WeightLists<T>* lists, int64_t r) {
        RowPairs<T> pairs(of_, params_, i, s);
        pairs.choose_positives(choice_.positives);
        RowTriplets<T> row{};
        row.s = s;
        row.m = of_.m;
        row.beta = beta_ ? beta_[i] : T(0);
        if (choice_.negatives == Selection::kAll) {
            all_negatives(pairs, row);
        } else {
            selected_negatives(pairs, row, lists, r);
        }
        sums.template data_ptr<T>()[i] = static_cast<T>(row.sum);
        int64_t* count = counts.template data_ptr<int64_t>() + 2 * i;
        count[0] = row.nonzero;
        count[1] = row.considered;
        if (grad_beta.numel() > 0) grad_beta.template data_ptr<T>()[i] = static_cast<T>(row.grad_beta);
    }

    // dL / d similarity of a positive with that slope by its distance; of a negative the negated.
    T positive_weight(double slope, T d) const {
        const double weight = -slope;
        return static_cast<T>(!of_.similarity.euclidean ? weight : d > T(0) ? weight / d : 0.0);
    }

    void all_negatives(const RowPairs<T>& pairs, RowTriplets<T>& row) {
        RowScratch<T>& scratch = pairs.scratch();
        const int64_t count = pairs.positives();
        row.count = count;
        row.negatives = pairs.negatives();
        row.interval = params_.gap_low > -infinity<T>() || params_.gap_high < infinity<T>();
        row.euclidean = of_.similarity.euclidean;
        row.write = save_;
        row.params = params_;
        scratch.slope.assign(count, 0.0);
        row.slope = scratch.slope.data();
        if (count > kFewPositives && term_ != TripletTerm::kSoftplus) sort_positives(scratch, row);
        row.positives = scratch.distances.data();
        of_.kernels.all_negatives[static_cast<int>(term_)](row);
        if (!save_) return;
        for (int64_t k = 0; k < count; ++k)
            row.s[scratch.columns[k]] = positive_weight(row.slope[k], scratch.distances[k]);
    }

    static void sort_positives(RowScratch<T>& scratch, RowTriplets<T>& row) {
        const size_t count = scratch.columns.size();
        scratch.sorted.resize(count);
        for (size_t k = 0; k < count; ++k) scratch.sorted[k] = {scratch.distances[k], scratch.columns[k]};
        std::sort(scratch.sorted.begin(), scratch.sorted.end());
        size_t space = 1;
        while (space <= count) space *= 2;
        scratch.distances.assign(space, infinity<T>());
        scratch.prefix.assign(count + 1, 0.0);
        scratch.steps.assign(count + 1, 0);
        for (size_t k = 0; k < count; ++k) {
            std::tie(scratch.distances[k], scratch.columns[k]) = scratch.sorted[k];
            scratch.prefix[k + 1] = scratch.prefix[k] + static_cast<double>(scratch.distances[k]);
        }
        row.prefix = scratch.prefix.data();
        row.steps = scratch.steps.data();
    }

    void selected_negatives(RowPairs<T>& pairs, RowTriplets<T>& row, WeightLists<T>* lists, int64_t r) {
        T* s = row.s;
        pairs.prepare(choice_.negatives, pairs.positives(), seed_);
        const MarginTerms<T> margin{row.beta, params_.margin};
        auto& weights = weights_of_row();
        weights.clear();
        for (int64_t k = 0; k < pairs.positives(); ++k) {
            const T d_pos = pairs.distance(k);
            const int64_t j = pairs.negative(choice_.negatives, k, d_pos);
            if (j < 0) continue;
            const T d_neg = -s[j];
            if (!params_.considered(d_pos, d_neg)) continue;
            ++row.considered;
            double by_pos = 0, by_neg = 0;  // the term's derivatives by d_pos and by -d_neg
            if (term_ == TripletTerm::kMargin) {
                const T of_pos = margin.positive(d_pos), of_neg = margin.negative(d_neg);
                by_pos = of_pos > T(0) ? 1 : 0;
                by_neg = of_neg > T(0) ? 1 : 0;
                row.sum += static_cast<double>(of_pos) + static_cast<double>(of_neg);
                row.nonzero += (of_pos > T(0)) + (of_neg > T(0));
                row.grad_beta += by_neg - by_pos;
            } else {
                const T violation = params_.violation(d_pos, d_neg);
                by_pos = by_neg = term_ == TripletTerm::kHinge ? add<HingeTerm<T>>(violation, row)
                                                               : add<SoftplusTerm<T>>(violation, row);
            }
            if (by_pos != 0) weights.emplace_back(pairs.column(k), positive_weight(by_pos, d_pos));
            if (by_neg != 0) weights.emplace_back(j, -positive_weight(by_neg, d_neg));
        }
        if (!save_) return;
        if (lists) {
            const int64_t at = lists->start[r];
            lists->count[r] = static_cast<int64_t>(weights.size());
            for (size_t k = 0; k < weights.size(); ++k) {
                lists->column[at + k] = static_cast<int32_t>(weights[k].first);
                lists->weight[at + k] = weights[k].second;
            }
        } else {
            std::fill(s, s + of_.m, T(0));
            for (const auto& [j, weight] : weights) s[j] += weight;
        }
    }

    // The slope of a triplet's term, which is added.
    template <typename Term>
    static double add(T violation, RowTriplets<T>& row) {
        if (!Term::counts(violation)) return 0;
        row.sum += static_cast<double>(Term::value(violation));
        row.nonzero += Term::nonzero(violation);
        return static_cast<double>(Term::slope(violation));
    }

    static std::vector<std::pair<int64_t, T>>& weights_of_row() {
        static thread_local std::vector<std::pair<int64_t, T>> weights;
        return weights;
    }

    const Similarities<T>& of_;
    const TripletTerm term_;
    const TripletChoice choice_;
    const TripletParams<T> params_;
    const T* const beta_;
    const uint64_t seed_;
    const bool save_;
    WeightLists<T> lists_;
};

using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
LossResult triplet_loss_of(const TripletPoints& points, const OptionalTensor& beta, uint64_t seed,
                           TripletTerm term, TripletChoice choice,
                           const std::array<double, kTripletParams>& params, bool save, bool save_ref) {
    const Similarities<T> of(points);
    const auto options = of.rows.options();
    const auto none = [&] { return at::empty({0}, options); };  // each its own: outputs must not alias
    const bool for_refs = save && save_ref && !of.square;
    const int64_t capacity = of.square ? 0 : points.ref_emb->size(0);
    if (!of.finite()) {
        const auto poison = [&](at::IntArrayRef shape) {
            return at::full(shape, std::numeric_limits<double>::quiet_NaN(), options);
        };
        return {poison({of.n}), at::zeros({of.n, 2}, options.dtype(at::kLong)),
                save ? poison({of.n, of.rows.dim}) : none(),
                for_refs ? poison({capacity, of.rows.dim}) : none(), beta && save ? poison({of.n}) : none()};
    }
    const Tensor betas = beta ? beta->to(options.dtype()).contiguous() : none();
    TripletLoss<T> loss(of, term, choice, params, beta ? betas.const_data_ptr<T>() : nullptr, seed, save);
    if (!save) {
        loss.run(nullptr);
        return {loss.sums, loss.counts, none(), none(), none()};
    }
    Gradient<T> gradient(of, for_refs);
    loss.run(&gradient);
    return {loss.sums, loss.counts, gradient.of_rows(), for_refs ? gradient.of_cols(capacity) : none(),
            beta ? loss.grad_beta : none()};
}

uint64_t seed_value(const OptionalTensor& seed) {
    return seed ? static_cast<uint64_t>(seed->item<int64_t>()) : 0;
}

LossResult triplet_loss(const Tensor& embeddings, const Tensor& labels, const OptionalTensor& ref_emb,
                        const OptionalTensor& ref_labels, const OptionalTensor& self_ref,
                        const OptionalTensor& ref_count, const OptionalTensor& beta,
                        const OptionalTensor& seed, c10::string_view term_name, c10::string_view positives,
                        c10::string_view negatives, at::ArrayRef<double> param_list,
                        c10::string_view similarity, bool save, bool save_ref) {
    const TripletPoints points{embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, similarity};
    check_triplet_points(points);
    const TripletTerm term = parse_term(term_name);
    const TripletChoice choice = parse_choice(positives, negatives);
    const auto params = triplet_params(param_list);
    check_beta(beta, term == TripletTerm::kMargin, embeddings);
    check_seed(seed, choice.negatives == Selection::kDrawn, embeddings);
    const auto run =
        embeddings.scalar_type() == at::kDouble ? triplet_loss_of<double> : triplet_loss_of<float>;
    return run(points, beta, seed_value(seed), term, choice, params, save, save_ref);
}

// ---- select -----------------------------------------------------------------------------------------------

void check_indices(const Tensor& anchors, const Tensor& positives, int64_t n, int64_t m) {
    const int64_t *a = anchors.const_data_ptr<int64_t>(), *p = positives.const_data_ptr<int64_t>();
    for_pieces(anchors.numel(), 1 << 14, anchors.numel(), [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) {
            TORCH_CHECK_INDEX(a[k] >= 0 && a[k] < n, "anchors: expected indices below ", n, ", got ", a[k]);
            TORCH_CHECK_INDEX(p[k] >= -1 && p[k] < m, "positives: expected indices below ", m, " or -1, got ",
                              p[k]);
            TORCH_CHECK_VALUE(k == 0 || a[k - 1] <= a[k], "anchors: expected ascending indices, got ", a[k],
                              " after ", a[k - 1]);
        }
    });
}

template <typename T>
std::tuple<Tensor, Tensor> select_of(const TripletPoints& points, uint64_t seed, SelectRule rule,
                                     const std::array<double, kTripletParams>& numbers,
                                     const OptionalTensor& anchors, const OptionalTensor& positives) {
    const Similarities<T> of(points);
    const TripletParams<T> params(numbers.data());
    const Tensor rows = anchors ? anchors->contiguous() : Tensor();
    const Tensor asked = anchors ? positives->contiguous() : Tensor();
    if (anchors) check_indices(rows, asked, of.n, of.m);
    const int64_t count = anchors ? rows.numel() : of.n;
    Tensor column = at::full({count}, -1, of.rows.options().dtype(at::kLong));
    Tensor similarity = at::full({count}, -infinity<double>(), of.rows.options());
    if (!of.finite()) return {column, similarity.fill_(std::numeric_limits<double>::quiet_NaN())};
    int64_t* columns = column.data_ptr<int64_t>();
    T* similarities = similarity.data_ptr<T>();
    const int64_t *row = anchors ? rows.const_data_ptr<int64_t>() : nullptr,
                  *positive = anchors ? asked.const_data_ptr<int64_t>() : nullptr;
    of.for_each_strip([&](const Strip<T>& strip) {
        of.for_each_row(strip, 1, [&](int64_t i, T* s) {
            const int64_t from = row ? std::lower_bound(row, row + count, i) - row : i;
            const int64_t to = row ? std::upper_bound(row, row + count, i) - row : i + 1;
            if (from == to) return;
            // Of each pair, before the positives are taken out.
            std::vector<T> d_pos(to - from, std::numeric_limits<T>::quiet_NaN());
            for (int64_t k = from; row && k < to; ++k) {
                if (positive[k] >= 0) d_pos[k - from] = -s[positive[k]];
            }
            RowPairs<T> pairs(of, params, i, s);
            if (rule.positive) {
                const int64_t best = pairs.extreme_positive(rule.which);
                if (best < 0) return;
                std::fill(columns + from, columns + to, pairs.column(best));
                std::fill(similarities + from, similarities + to, -pairs.distance(best));
                return;
            }
            pairs.prepare(rule.which, to - from, seed);
            for (int64_t k = from; k < to; ++k) {
                if (row && positive[k] < 0) continue;
                const int64_t j = pairs.negative(rule.which, k - from, d_pos[k - from]);
                if (j < 0) continue;
                columns[k] = j;
                similarities[k] = s[j];
            }
        });
    });
    return {column, similarity};
}

std::tuple<Tensor, Tensor> select(const Tensor& embeddings, const Tensor& labels,
                                  const OptionalTensor& ref_emb, const OptionalTensor& ref_labels,
                                  const OptionalTensor& self_ref, const OptionalTensor& ref_count,
                                  const OptionalTensor& seed, c10::string_view rule_name,
                                  at::ArrayRef<double> param_list, const OptionalTensor& anchors,
                                  const OptionalTensor& positives, c10::string_view similarity) {
    const TripletPoints points{embeddings, labels, ref_emb, ref_labels, self_ref, ref_count, similarity};
    check_triplet_points(points);
    const SelectRule rule = parse_rule(rule_name);
    const auto params = triplet_params(param_list);
    check_pairs(anchors, positives, rule, embeddings);
    check_seed(seed, rule.which == Selection::kDrawn, embeddings);
    const auto run = embeddings.scalar_type() == at::kDouble ? select_of<double> : select_of<float>;
    return run(points, seed_value(seed), rule, params, anchors, positives);
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("triplet_loss", &triplet_loss);
    m.impl("select", &select);
}

}  // namespace dml::cpu
