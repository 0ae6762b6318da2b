// The op select: the column that a mining rule selects for each row or positive pair.
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/triplets/row.h"

namespace dml::cpu {

using namespace triplet;

namespace {

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
    const LabelledSimilarities<T> labelled(points);
    const TripletParams<T> params(numbers.data());
    const Tensor rows = anchors ? anchors->contiguous() : Tensor();
    const Tensor pair_cols = anchors ? positives->contiguous() : Tensor();
    if (anchors) check_indices(rows, pair_cols, labelled.n, labelled.m);
    const int64_t count = anchors ? rows.numel() : labelled.n;
    Tensor column = at::full({count}, -1, labelled.rows.options().dtype(at::kLong));
    Tensor similarity = at::full({count}, -infinity<double>(), labelled.rows.options());
    if (!labelled.finite()) return {column, similarity.fill_(std::numeric_limits<double>::quiet_NaN())};
    int64_t* columns = column.data_ptr<int64_t>();
    T* similarities = similarity.data_ptr<T>();
    // Not by their pointers: that of an empty list is null.
    const bool of_pairs = anchors.has_value();
    const int64_t *row = of_pairs ? rows.const_data_ptr<int64_t>() : nullptr,
                  *positive = of_pairs ? pair_cols.const_data_ptr<int64_t>() : nullptr;
    labelled.for_each_row_block([&](const RowBlock<T>& block) {
        labelled.for_each_row(block, 1, [&](int64_t i, T* s) {
            const int64_t from = of_pairs ? std::lower_bound(row, row + count, i) - row : i;
            const int64_t to = of_pairs ? std::upper_bound(row, row + count, i) - row : i + 1;
            if (from == to) return;
            // Before RowPairs replaces the similarities of positives.
            std::vector<T> d_pos(to - from, std::numeric_limits<T>::quiet_NaN());
            for (int64_t k = from; of_pairs && k < to; ++k) {
                if (positive[k] >= 0) d_pos[k - from] = -s[positive[k]];
            }
            RowPairs<T> pairs(labelled, params, i, s);
            if (rule.positive) {
                const int64_t best = pairs.extreme_positive(rule.which);
                if (best < 0) return;
                std::fill(columns + from, columns + to, pairs.column(best));
                std::fill(similarities + from, similarities + to, -pairs.distance(best));
                return;
            }
            pairs.prepare(rule.which, to - from, seed);
            for (int64_t k = from; k < to; ++k) {
                if (of_pairs && positive[k] < 0) continue;
                const int64_t j = pairs.negative(rule.which, k - from, d_pos[k - from]);
                if (j < 0) continue;
                columns[k] = j;
                similarities[k] = s[j];
            }
        });
    });
    return {column, similarity};
}

std::tuple<Tensor, Tensor> select(const PairBatch& batch, const OptionalTensor& seed,
                                  c10::string_view rule_name, at::ArrayRef<double> param_list,
                                  const OptionalTensor& anchors, const OptionalTensor& positives,
                                  c10::string_view similarity) {
    const Tensor& embeddings = batch.embeddings;
    const TripletPoints points{batch, similarity};
    check_triplet_points(points);
    const SelectRule rule = parse_rule(rule_name);
    const auto params = triplet_params(param_list);
    check_pairs(anchors, positives, rule, embeddings);
    check_seed(seed, rule.which == Selection::kDrawn, embeddings);
    const auto run = embeddings.scalar_type() == at::kDouble ? select_of<double> : select_of<float>;
    return run(points, seed_value(seed), rule, params, anchors, positives);
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) { m.impl("select", &FlatOp<&select>::call); }

}  // namespace dml::cpu
