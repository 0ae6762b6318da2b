// The ops on triplets and ranks on CUDA tensors: a block of rows against all columns at a time. The products of points,
// and of weights with points, are PyTorch's matrix products, float32 as precisely as the user has set it;
// what lies between them are the kernels of cuda/triplets.cu. Nothing here waits for the device.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "core/tiny_norm.h"
#include "cuda/triplets/triplets.h"
#include "torch/ranking_ops.h"
#include "torch/triplet_ops.h"

namespace dml::cuda {
namespace {

using at::Tensor;

// Memory of the similarities of a row block.
constexpr int64_t kRowBlockBytes = int64_t(64) << 20;

// One side's points as they are compared: unit rows, or as they come, in the type computed in.
struct Side {
    Tensor rows;      // [count, D]
    Tensor inv_norm;  // [count, 1] of unit rows: 1 / |q|, 0 for tiny rows
    Tensor squares;   // [count] |x|^2, where euclidean
    Tensor poison;    // 0, or NaN where a number is not finite

    Side(const Tensor& points, const OptionalTensor& count, Similarity how, at::ScalarType type) {
        rows = points.to(type).contiguous();
        if (count) {  // what does not take part may hold anything
            const Tensor index = at::arange(rows.size(0), rows.options().dtype(at::kLong));
            rows = at::where(at::lt(index, *count).unsqueeze(1), rows, at::zeros({}, rows.options()));
        }
        if (how.normalize) {
            // Scaled by the largest element first: squares must neither overflow nor vanish.
            const Tensor largest =
                rows.numel() > 0 ? rows.abs().amax(1, true) : rows.new_zeros({rows.size(0), 1});
            const Tensor scale = at::where(largest > 0, largest, at::ones({}, rows.options()));
            const Tensor norm = (rows / scale).square().sum(1, true).sqrt() * scale;
            inv_norm = at::where(norm > kTinyNorm, norm.reciprocal(), at::zeros({}, rows.options()));
            poison = (norm * 0).sum();
            rows = rows * inv_norm;
        } else {
            poison = (rows.square().sum(1) * 0).sum();
        }
        if (how.euclidean) squares = rows.square().sum(1);
    }

    // From the gradient by these rows, and the sum of each row's weights, to that by the embeddings.
    Tensor back(const Tensor& gradient, const Tensor& weights, Similarity how) const {
        if (how.normalize) return (gradient - (gradient * rows).sum(1, true) * rows) * inv_norm;
        return how.euclidean ? gradient - weights.unsqueeze(1) * rows : gradient;
    }
};

// What the ops have in common: both sides, and blocks of rows of their similarities.
class Similarities {
   public:
    Similarities(const TripletPoints& of, at::ScalarType type)
        : how(parse_similarity(of.similarity)),
          square(!of.ref_emb),
          rows(of.embeddings, std::nullopt, how, type),
          other(square ? std::nullopt : std::optional<Side>(Side(*of.ref_emb, of.num_valid_refs, how, type))),
          cols(square ? rows : *other),
          n(rows.rows.size(0)),
          m(cols.rows.size(0)) {
        const Tensor labels = of.labels.contiguous();
        const Tensor columns = square ? labels : of.ref_labels->contiguous();
        auto [sorted, order] = at::sort(columns, /*stable=*/true, /*dim=*/0, /*descending=*/false);
        members_ = order;
        begin_ = at::searchsorted(sorted, labels);
        end_ = at::searchsorted(sorted, labels, /*out_int32=*/false, /*right=*/true);
        if (of.self_index) own_ = of.self_index->contiguous();
        if (of.num_valid_refs) num_valid_refs_ = of.num_valid_refs->contiguous();
    }

    const Similarity how;
    const bool square;
    const Side rows;
    const std::optional<Side> other;  // the columns where they are not the rows
    const Side& cols;
    const int64_t n, m;

    Tensor poison() const { return square ? rows.poison : rows.poison + cols.poison; }

    // Calls visit(first row, similarities [rows, m], the kernels' view of them, their workspace). space: a row
    // needs workspace as if it had so many columns at least.
    template <typename T, typename Visit>
    void for_each_row_block(const Visit& visit, int64_t space = 0) const {
        if (n == 0 || m == 0) return;
        const int64_t most = std::clamp<int64_t>(kRowBlockBytes / (m * int64_t(sizeof(T))), 1, n);
        const Tensor memory = at::empty({most, m}, rows.rows.options());
        const Tensor workspace = at::empty({triplet_workspace_bytes<T>(most, std::max(m, space))},
                                           rows.rows.options().dtype(at::kByte));
        const auto pointer = [](const Tensor& x) {
            return x.defined() ? x.const_data_ptr<int64_t>() : nullptr;
        };
        for (int64_t first = 0; first < n; first += most) {
            const int64_t count = std::min(most, n - first);
            Tensor s = memory.narrow(0, 0, count);
            const Tensor x = rows.rows.narrow(0, first, count);
            at::mm_out(s, x, cols.rows.t());
            const TripletRowBlock<T> row_block = {s.data_ptr<T>(),
                                                  count,
                                                  m,
                                                  m,
                                                  first,
                                                  pointer(members_),
                                                  pointer(begin_),
                                                  pointer(end_),
                                                  pointer(own_),
                                                  square,
                                                  pointer(num_valid_refs_)};
            if (how.euclidean) {
                make_distances(row_block, x.const_data_ptr<T>(), rows.squares.const_data_ptr<T>() + first,
                               cols.rows.const_data_ptr<T>(), cols.squares.const_data_ptr<T>(),
                               rows.rows.size(1), c10::cuda::getCurrentCUDAStream());
            }
            visit(first, s, row_block, workspace.data_ptr());
        }
    }

   private:
    Tensor members_, begin_, end_, own_, num_valid_refs_;
};

TripletRules rules_of(TripletTerm term, TripletChoice choice, at::ArrayRef<double> params, Similarity how,
                      bool write, const OptionalTensor& seed) {
    const auto numbers = triplet_params(params);
    TripletRules rules = {term,
                          choice.positives,
                          choice.negatives,
                          {},
                          how.euclidean,
                          write,
                          seed ? seed->const_data_ptr<int64_t>() : nullptr};
    std::copy(numbers.begin(), numbers.end(), rules.params);
    return rules;
}

using LossResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradient of the points from the weights of row blocks.
class RowBlockGradient {
   public:
    RowBlockGradient(const Similarities& of, bool save, bool save_ref)
        : of_(of),
          save_(save),
          for_refs_(save && save_ref && !of.square),
          sum_weights_(save && of.how.euclidean && !of.how.normalize) {
        const auto options = of.rows.rows.options();
        by_rows_ = save ? at::zeros_like(of.rows.rows) : at::empty({0}, options);
        by_cols_ = of.square ? by_rows_ : for_refs_ ? at::zeros_like(of.cols.rows) : at::empty({0}, options);
        row_weights_ = at::zeros({sum_weights_ ? of.n : 0}, options);
        col_weights_ = of.square ? row_weights_ : at::zeros({sum_weights_ && for_refs_ ? of.m : 0}, options);
    }

    // The weights [rows, m] of a block from row `first` on.
    void add(int64_t first, const Tensor& weights) {
        if (!save_) return;
        const int64_t count = weights.size(0);
        by_rows_.narrow(0, first, count).addmm_(weights, of_.cols.rows);
        if (of_.square || for_refs_) by_cols_.addmm_(weights.t(), of_.rows.rows.narrow(0, first, count));
        if (!sum_weights_) return;
        row_weights_.narrow(0, first, count).add_(weights.sum(1));
        if (of_.square || for_refs_) col_weights_.add_(weights.sum(0));
    }

    Tensor by_embeddings(const Tensor& poison) const {
        return save_ ? of_.rows.back(by_rows_, row_weights_, of_.how).add_(poison) : none();
    }
    Tensor by_refs(const Tensor& poison) const {
        return for_refs_ ? of_.cols.back(by_cols_, col_weights_, of_.how).add_(poison) : none();
    }
    Tensor none() const { return at::empty({0}, of_.rows.rows.options()); }

   private:
    const Similarities& of_;
    const bool save_, for_refs_;
    const bool sum_weights_;    // of distances of rows as they come
    Tensor by_rows_, by_cols_;  // by the points as they are compared; the same where square
    Tensor row_weights_, col_weights_;
};

template <typename T>
LossResult triplet_loss_of(const Similarities& of, const TripletRules& rules,
                           const OptionalTensor& row_params, bool save, bool save_ref) {
    const auto options = of.rows.rows.options();
    Tensor sums = at::zeros({of.n}, options), counts = at::zeros({of.n, 2}, options.dtype(at::kLong));
    const Tensor of_rows = row_params ? row_params->to(options.dtype()).contiguous() : Tensor();
    Tensor grad_row_params = at::zeros({row_params && save ? of.n : 0}, options);
    RowBlockGradient gradient(of, save, save_ref);
    of.for_each_row_block<T>(
        [&](int64_t first, const Tensor& s, const TripletRowBlock<T>& row_block, void* workspace) {
            triplet_rows(row_block, rules, of_rows.defined() ? of_rows.const_data_ptr<T>() : nullptr,
                         sums.data_ptr<T>(), counts.data_ptr<int64_t>(),
                         grad_row_params.numel() > 0 ? grad_row_params.data_ptr<T>() : nullptr, workspace,
                         c10::cuda::getCurrentCUDAStream());
            gradient.add(first, s);
        });
    const Tensor poison = of.poison();
    return {sums.add_(poison), counts, gradient.by_embeddings(poison), gradient.by_refs(poison),
            grad_row_params.add_(poison)};
}

at::ScalarType type_of(const Tensor& embeddings) {
    return embeddings.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

LossResult triplet_loss(const PairBatch& batch, const OptionalTensor& row_params, const OptionalTensor& seed,
                        c10::string_view term_name, c10::string_view positives, c10::string_view negatives,
                        at::ArrayRef<double> params, c10::string_view similarity, bool save, bool save_ref) {
    const Tensor& embeddings = batch.embeddings;
    const TripletPoints points{batch, similarity};
    check_triplet_points(points);
    const TripletTerm term = parse_term(term_name);
    const TripletChoice choice = parse_choice(positives, negatives);
    check_row_params(row_params, term == TripletTerm::kMargin, embeddings);
    check_seed(seed, choice.negatives == Selection::kDrawn, embeddings);
    const c10::cuda::CUDAGuard guard(embeddings.device());
    const Similarities of(points, type_of(embeddings));
    const TripletRules rules = rules_of(term, choice, params, of.how, save, seed);
    const auto run = type_of(embeddings) == at::kDouble ? triplet_loss_of<double> : triplet_loss_of<float>;
    return run(of, rules, row_params, save, save_ref);
}

template <typename T>
LossResult ranking_loss_of(const Similarities& of, const RankingRule& rule, const OptionalTensor& row_weights,
                           bool save, bool save_ref, bool save_params) {
    const auto options = of.rows.rows.options();
    RankingRules rules = {};
    rules.loss = rule.loss;
    rules.possible = rule.possible();
    rules.temperature = rule.temperature;
    rules.temperature_k = rule.temperature_k;
    std::copy(rule.cutoffs.begin(), rule.cutoffs.end(), rules.cutoffs);
    rules.cutoff_count = static_cast<int>(rule.cutoffs.size());
    rules.bins = rule.bins;
    rules.euclidean = of.how.euclidean;
    rules.write = save;
    Tensor losses = at::zeros({of.n}, options), counts = at::zeros({of.n, 2}, options.dtype(at::kLong));
    Tensor by_params = at::zeros({save_params ? of.n : 0, 2}, options.dtype(at::kDouble));
    const Tensor weights = row_weights ? row_weights->to(at::kDouble).contiguous() : Tensor();
    RowBlockGradient gradient(of, save, save_ref);
    of.for_each_row_block<T>(
        [&](int64_t first, const Tensor& s, const TripletRowBlock<T>& row_block, void* workspace) {
            ranking_rows(row_block, rules, row_weights ? weights.const_data_ptr<double>() : nullptr,
                         losses.data_ptr<T>(), counts.data_ptr<int64_t>(),
                         by_params.numel() > 0 ? by_params.data_ptr<double>() : nullptr, workspace,
                         c10::cuda::getCurrentCUDAStream());
            gradient.add(first, s);
        },
        ranking_space(rules, of.m));
    const Tensor poison = of.poison();
    // Of parameters on the CPU, which wait for their gradient.
    const Tensor grad_params = save_params ? as_params(by_params.add_(poison).sum(0).cpu(), rule)
                                           : at::empty({0}, at::TensorOptions(at::kDouble));
    return {losses.add_(poison), counts, gradient.by_embeddings(poison), gradient.by_refs(poison),
            grad_params};
}

LossResult ranking_loss(const PairBatch& batch, const OptionalTensor& row_weights,
                        const OptionalTensor& dynamic_params, c10::string_view loss,
                        at::ArrayRef<double> params, c10::string_view similarity, bool save, bool save_ref,
                        bool save_params) {
    const Tensor& embeddings = batch.embeddings;
    const TripletPoints points{batch, similarity};
    check_triplet_points(points);
    check_row_weights(row_weights, embeddings.size(0), embeddings);
    const RankingRule rule = ranking_rule(loss, params, dynamic_params, similarity);
    const c10::cuda::CUDAGuard guard(embeddings.device());
    const Similarities of(points, type_of(embeddings));
    const auto run = type_of(embeddings) == at::kDouble ? ranking_loss_of<double> : ranking_loss_of<float>;
    return run(of, rule, row_weights, save, save && save_ref, save && save_params);
}

template <typename T>
void select_of(const Similarities& of, const TripletRules& rules, const SelectedPairs& pairs, Tensor& column,
               Tensor& similarity) {
    of.for_each_row_block<T>(
        [&](int64_t, const Tensor&, const TripletRowBlock<T>& row_block, void* workspace) {
            select_rows(row_block, rules, pairs, column.data_ptr<int64_t>(), similarity.data_ptr<T>(),
                        workspace, c10::cuda::getCurrentCUDAStream());
        });
}

// Anchors that do not ascend, or lie outside, find nothing: looking would wait for the device.
std::tuple<Tensor, Tensor> select(const PairBatch& batch, const OptionalTensor& seed,
                                  c10::string_view rule_name, at::ArrayRef<double> params,
                                  const OptionalTensor& anchors, const OptionalTensor& positives,
                                  c10::string_view similarity_name) {
    const Tensor& embeddings = batch.embeddings;
    const TripletPoints points{batch, similarity_name};
    check_triplet_points(points);
    const SelectRule rule = parse_rule(rule_name);
    check_pairs(anchors, positives, rule, embeddings);
    check_seed(seed, rule.which == Selection::kDrawn, embeddings);
    const c10::cuda::CUDAGuard guard(embeddings.device());
    const Similarities of(points, type_of(embeddings));
    const TripletRules rules =
        rules_of(TripletTerm::kHinge, {Selection::kAll, rule.which}, params, of.how, false, seed);
    const Tensor rows = anchors ? anchors->contiguous() : Tensor();
    const Tensor asked = anchors ? positives->contiguous() : Tensor();
    const int64_t count = anchors ? rows.numel() : of.n;
    Tensor column = at::full({count}, -1, of.rows.rows.options().dtype(at::kLong));
    Tensor similarity = at::full({count}, -infinity<double>(), of.rows.rows.options());
    const SelectedPairs pairs = {anchors.has_value(), anchors ? rows.const_data_ptr<int64_t>() : nullptr,
                                 anchors ? asked.const_data_ptr<int64_t>() : nullptr, count, rule.positive};
    const auto run = type_of(embeddings) == at::kDouble ? select_of<double> : select_of<float>;
    run(of, rules, pairs, column, similarity);
    return {column, similarity.add_(of.poison())};
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CUDA, m) {
    m.impl("triplet_loss", &FlatOp<&triplet_loss>::call);
    m.impl("ranking_loss", &FlatOp<&ranking_loss>::call);
    m.impl("select", &FlatOp<&select>::call);
}

}  // namespace dml::cuda
