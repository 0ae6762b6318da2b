// The plan of a batch: rows and columns in the order of their labels, so that the positives of a row are one
// run of columns. Only indices are sorted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/tasks.h"

namespace dml::cpu {

// int32: [row_order N | pos_begin N | pos_end N | col_order M | col_pos_begin M | col_pos_end M], col_order only
// where rectangular, the last two only where columns have losses: their positives are rows.
struct Plan {
    const int32_t *row_order, *pos_begin, *pos_end, *col_order, *col_pos_begin, *col_pos_end;

    Plan(const int32_t* data, int64_t n, int64_t m, bool square)
        : row_order(data),
          pos_begin(data + n),
          pos_end(data + 2 * n),
          col_order(square ? data : data + 3 * n),
          col_pos_begin(data + 3 * n + m),
          col_pos_end(data + 3 * n + 2 * m) {}
};

// Stable: sorts pieces in parallel, then merges pairs of them.
inline void sort_by_label(const int64_t* labels, int64_t n, int32_t* order) {
    constexpr int64_t kPiece = 4096;
    std::iota(order, order + n, 0);
    if (std::is_sorted(labels, labels + n)) return;
    const auto before = [labels](int32_t a, int32_t b) { return labels[a] < labels[b]; };
    for_pieces(n, kPiece, n * 16,
               [&](int64_t from, int64_t to) { std::stable_sort(order + from, order + to, before); });
    std::vector<int32_t> buffer(n > kPiece ? n : 0);
    int32_t *source = order, *target = buffer.data();
    for (int64_t width = kPiece; width < n; width *= 2, std::swap(source, target)) {
        for_pieces(n, 2 * width, n * 4, [&](int64_t from, int64_t to) {
            const int64_t middle = std::min(from + width, to);
            std::merge(source + from, source + middle, source + middle, source + to, target + from, before);
        });
    }
    if (source != order) std::copy(source, source + n, order);
}

// The run of columns with the label of each row; rows and columns in order.
inline void find_positives(const int64_t* labels, const int32_t* row_order, int64_t n,
                           const int64_t* ref_labels, const int32_t* col_order, int64_t m, int32_t* pos_begin,
                           int32_t* pos_end) {
    for_pieces(n, 4096, n * 4 + m, [&](int64_t from, int64_t to) {
        const auto below = [&](int32_t column, int64_t label) { return ref_labels[column] < label; };
        int64_t begin =
            std::lower_bound(col_order, col_order + m, labels[row_order[from]], below) - col_order;
        int64_t end = begin;
        for (int64_t i = from; i < to; ++i) {  // both sides are sorted: the run only ever moves forward
            const int64_t label = labels[row_order[i]];
            while (begin < m && ref_labels[col_order[begin]] < label) ++begin;
            end = std::max(begin, end);
            while (end < m && ref_labels[col_order[end]] == label) ++end;
            pos_begin[i] = static_cast<int32_t>(begin);
            pos_end[i] = static_cast<int32_t>(end);
        }
    });
}

inline void make_plan(const int64_t* labels, int64_t n, const int64_t* ref_labels, int64_t m, bool square,
                      bool both_directions, int32_t* plan) {
    int32_t* row_order = plan;
    int32_t* col_order = square ? row_order : plan + 3 * n;
    sort_by_label(labels, n, row_order);
    if (!square) sort_by_label(ref_labels, m, col_order);
    find_positives(labels, row_order, n, ref_labels, col_order, m, plan + n, plan + 2 * n);
    if (both_directions) {
        int32_t* col_pos_begin = plan + 3 * n + m;
        find_positives(ref_labels, col_order, m, labels, row_order, n, col_pos_begin, col_pos_begin + m);
    }
}

// For every sorted row the sorted column that is the same point, or -1. self_index [N] has it in the order of
// the embeddings; null: row i is column i.
inline std::vector<int32_t> self_columns(const Plan& plan, int64_t n, int64_t m, const int64_t* self_index) {
    std::vector<int32_t> columns(n);
    if (!self_index) {
        std::iota(columns.begin(), columns.end(), 0);
        return columns;
    }
    std::vector<int32_t> rank(m);
    for_pieces(m, 16384, m, [&](int64_t from, int64_t to) {
        for (int64_t j = from; j < to; ++j) rank[plan.col_order[j]] = static_cast<int32_t>(j);
    });
    for_pieces(n, 16384, n, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const int64_t self = self_index[plan.row_order[i]];
            columns[i] = self >= 0 && self < m ? rank[self] : -1;
        }
    });
    return columns;
}

}  // namespace dml::cpu
