// The op triplet_loss. A row block holds the similarities of its rows to all columns; the loss of a row's
// triplets turns them into weights of the gradient in place. No triplet is listed, and memory is that of a
// row block.
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/triplets/result.h"
#include "cpu/triplets/row.h"

namespace dml::cpu {

using namespace triplet;

namespace {

// Row blocks with a smaller share of non-zero weights are multiplied weight by weight.
constexpr double kSparseWeights = 0.05;

template <typename T>
class TripletLoss : public RowResults<T> {
   public:
    TripletLoss(const LabelledSimilarities<T>& similarities, TripletTerm term, TripletChoice choice,
                const std::array<double, kTripletParams>& params, const T* row_params, uint64_t seed,
                bool save)
        : RowResults<T>(similarities,
                        at::zeros({row_params && save ? similarities.n : 0}, similarities.rows.options())),
          similarities_(similarities),
          term_(term),
          choice_(choice),
          params_(params.data()),
          row_params_(row_params),
          seed_(seed),
          save_(save) {}

    void run(RowBlockGradient<T>* gradient) {
        similarities_.for_each_row_block([&](const RowBlock<T>& block) {
            const bool listed = gradient && plan_lists(block);
            similarities_.for_each_row(
                block, choice_.positives == Selection::kAll ? 4 : 1,
                [&](int64_t i, T* s) { row(i, s, listed ? &lists_ : nullptr, i - block.first); });
            if (!gradient) return;
            if (listed) {
                gradient->add(block, lists_);
            } else {
                gradient->add(block);
            }
        });
    }

   private:
    int64_t most_weights(int64_t i) const {
        const int64_t positives = similarities_.same_label(i).size();
        return 2 * (choice_.positives == Selection::kAll ? positives : std::min<int64_t>(positives, 1));
    }

    // Prepares lists for the weights of a row block, if they are few.
    bool plan_lists(const RowBlock<T>& block) {
        if (choice_.negatives == Selection::kAll) return false;
        lists_.start.assign(block.rows() + 1, 0);
        for (int64_t r = 0; r < block.rows(); ++r)
            lists_.start[r + 1] = lists_.start[r] + most_weights(block.first + r);
        const int64_t most = lists_.start.back();
        if (static_cast<double>(most) > kSparseWeights * static_cast<double>(block.rows() * similarities_.m))
            return false;
        lists_.count.assign(block.rows(), 0);
        lists_.column.resize(most);
        lists_.weight.resize(most);
        return true;
    }

    void row(int64_t i, T* s, WeightLists<T>* lists, int64_t r) {
        RowPairs<T> pairs(similarities_, params_, i, s);
        pairs.choose_positives(choice_.positives);
        RowTriplets<T> row{};
        row.s = s;
        row.m = similarities_.m;
        row.params = params_;
        if (row_params_ && term_ == TripletTerm::kMargin) row.beta = row_params_[i];
        if (row_params_ && term_ != TripletTerm::kMargin) row.params.margin = row_params_[i];
        if (choice_.negatives == Selection::kAll) {
            all_negatives(pairs, row);
        } else {
            selected_negatives(pairs, row, lists, r);
        }
        this->sums.template data_ptr<T>()[i] = static_cast<T>(row.sum);
        int64_t* count = this->counts.template data_ptr<int64_t>() + 2 * i;
        count[0] = row.nonzero;
        count[1] = row.considered;
        if (this->grad_params.numel() > 0)
            this->grad_params.template data_ptr<T>()[i] = static_cast<T>(row.by_param);
    }

    // dL/ds of a positive at distance d with dL/dd = derivative; for a negative, negate it.
    T positive_weight(double derivative, T d) const {
        const double weight = -derivative;
        return static_cast<T>(!similarities_.similarity.euclidean ? weight : d > T(0) ? weight / d : 0.0);
    }

    void all_negatives(const RowPairs<T>& pairs, RowTriplets<T>& row) {
        RowScratch<T>& scratch = pairs.scratch();
        const int64_t count = pairs.positives();
        row.count = count;
        row.negatives = pairs.negatives();
        row.interval = params_.gap_low > -infinity<T>() || params_.gap_high < infinity<T>();
        row.euclidean = similarities_.similarity.euclidean;
        row.write = save_;
        scratch.derivative.assign(count, 0.0);
        row.derivative = scratch.derivative.data();
        if (count > kFewPositives && term_ != TripletTerm::kSoftplus) sort_positives(scratch, row);
        row.positives = scratch.distances.data();
        similarities_.kernels.all_negatives[static_cast<int>(term_)](row);
        if (!save_) return;
        for (int64_t k = 0; k < count; ++k)
            row.s[scratch.columns[k]] = positive_weight(row.derivative[k], scratch.distances[k]);
        if (term_ != TripletTerm::kMargin)
            row.by_param = std::accumulate(row.derivative, row.derivative + count, 0.0);
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
        const MarginTerms<T> margin{row.beta, row.params.margin};
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
                row.by_param += by_neg - by_pos;
            } else {
                const T violation = row.params.violation(d_pos, d_neg);
                by_pos = by_neg = term_ == TripletTerm::kHinge ? add<HingeTerm<T>>(violation, row)
                                                               : add<SoftplusTerm<T>>(violation, row);
                row.by_param += by_pos;
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
            std::fill(s, s + similarities_.m, T(0));
            for (const auto& [j, weight] : weights) s[j] += weight;
        }
    }

    // Adds a triplet's term to the row; returns its derivative.
    template <typename Term>
    static double add(T violation, RowTriplets<T>& row) {
        if (!Term::counts(violation)) return 0;
        row.sum += static_cast<double>(Term::value(violation));
        row.nonzero += Term::nonzero(violation);
        return static_cast<double>(Term::derivative(violation));
    }

    static std::vector<std::pair<int64_t, T>>& weights_of_row() {
        static thread_local std::vector<std::pair<int64_t, T>> weights;
        return weights;
    }

    const LabelledSimilarities<T>& similarities_;
    const TripletTerm term_;
    const TripletChoice choice_;
    const TripletParams<T> params_;
    const T* const row_params_;  // [N] or null
    const uint64_t seed_;
    const bool save_;
    WeightLists<T> lists_;
};

RowLossResult triplet_loss(const PairBatch& batch, const OptionalTensor& row_params,
                           const OptionalTensor& seed, c10::string_view term_name, c10::string_view positives,
                           c10::string_view negatives, at::ArrayRef<double> param_list,
                           c10::string_view similarity, bool save, bool save_ref) {
    const Tensor& embeddings = batch.embeddings;
    const TripletPoints points{batch, similarity};
    check_triplet_points(points);
    const TripletTerm term = parse_term(term_name);
    const TripletChoice choice = parse_choice(positives, negatives);
    const auto params = triplet_params(param_list);
    check_row_params(row_params, term == TripletTerm::kMargin, embeddings);
    check_seed(seed, choice.negatives == Selection::kDrawn, embeddings);
    const auto run = [&](auto number) {
        using T = decltype(number);
        const LabelledSimilarities<T> similarities(points);
        const Tensor of_rows =
            row_params ? row_params->to(similarities.rows.options().dtype()).contiguous() : Tensor();
        TripletLoss<T> loss(similarities, term, choice, params,
                            row_params ? of_rows.const_data_ptr<T>() : nullptr, seed_value(seed), save);
        return run_loss(similarities, loss, save, save_ref, batch.ref_emb ? batch.ref_emb->size(0) : 0);
    };
    return embeddings.scalar_type() == at::kDouble ? run(double()) : run(float());
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) { m.impl("triplet_loss", &FlatOp<&triplet_loss>::call); }

}  // namespace dml::cpu
