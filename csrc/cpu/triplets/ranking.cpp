// The op ranking_loss. As for triplets a row block holds the similarities of its rows to all columns, and the
// loss of a row turns them into weights of the gradient in place. Nothing is as long as the positives times
// the columns.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/triplets/result.h"
#include "cpu/triplets/row.h"
#include "torch/ranking_ops.h"

namespace dml::cpu {

using namespace triplet;

namespace {

// Positives [first, last) that lie near a centre, in order of their similarities.
template <typename T>
struct RankGroup {
    int64_t first, last;
    T centre;
};

// Memory for a row, kept by each thread.
template <typename T>
struct RankingScratch {
    std::vector<T> weights, far;       // [m] of the columns
    std::vector<RankBlock<T>> blocks;  // of the columns
    std::vector<std::pair<T, int32_t>> sorted;
    std::vector<RankGroup<T>> groups;
    // [P], of the positives as their similarities ascend: these, their columns, weights and derivatives by both
    // ranks, and both factors of RowRanks.
    std::vector<T> positives, pos_weights, by_rank, by_pos_rank, near, pos_far;
    std::vector<int32_t> columns;
    std::vector<double> ranks, slopes, pos_ranks, pos_slopes;
    // FastAP, at each edge: the positives; and the other columns at or below it, then derivatives by these.
    std::vector<double> at_edge, below;
    std::vector<double> by_pos;  // derivatives by the positives at each edge
    std::vector<T> by_place;     // and by the place of a column within each bin

    // Of the positives that a row found.
    void sort_positives(const RowPairs<T>& pairs) {
        const int64_t count = pairs.positives();
        sorted.resize(count);
        for (int64_t k = 0; k < count; ++k)
            sorted[k] = {-pairs.distance(k), static_cast<int32_t>(pairs.column(k))};
        std::sort(sorted.begin(), sorted.end());
        positives.resize(count);
        columns.resize(count);
        for (int64_t k = 0; k < count; ++k) std::tie(positives[k], columns[k]) = sorted[k];
    }

    // Cuts the positives into groups that one factor of each column serves.
    void group_positives(T inverse) {
        const int64_t count = positives.size();
        groups.clear();
        near.resize(count);
        for (int64_t first = 0, last; first < count; first = last) {
            const T most = positives[first];
            for (last = first + 1; last < count && (positives[last] - most) * inverse <= T(2) * kReach<T>;
                 ++last) {
            }
            const T centre = most + (positives[last - 1] - most) / T(2);
            groups.push_back({first, last, centre});
            for (int64_t j = first; j < last; ++j) near[j] = near_factor(positives[j], centre, inverse);
        }
    }

    static RankingScratch& mine() {
        static thread_local RankingScratch scratch;
        return scratch;
    }
};

// What a row's loss is but for its weight.
struct RowScore {
    double loss = 0, by_temperature = 0, by_temperature_k = 0;
};

template <typename T>
class RankingRows : public RowResults<T> {
   public:
    // weights: of the rows, or null. save: whether gradients are wanted; save_params: by the temperatures too.
    RankingRows(const LabelledSimilarities<T>& similarities, const RankingRule& rule, const double* weights,
                bool save, bool save_params)
        : RowResults<T>(similarities,
                        at::zeros({save_params ? similarities.n : 0, 2}, at::TensorOptions(at::kDouble))),
          similarities_(similarities),
          rule_(rule),
          row_weights_(weights),
          save_(save) {}

    void run(RowBlockGradient<T>* gradient) {
        // Each positive is compared with all columns, twice for the gradient.
        const int64_t work = rule_.loss == Ranking::kFastAP ? rule_.bins : 32;
        similarities_.for_each_row_block([&](const RowBlock<T>& block) {
            similarities_.for_each_row(block, work, [&](int64_t i, T* s) { row(i, s); });
            if (gradient) gradient->add(block);
        });
    }

   private:
    void row(int64_t i, T* s) {
        const RowPairs<T> pairs(similarities_, every_pair_, i, s);
        RankingScratch<T>& scratch = RankingScratch<T>::mine();
        const int64_t count = pairs.positives(), m = similarities_.m;
        int64_t* counts = this->counts.template data_ptr<int64_t>() + 2 * i;
        counts[1] = count > 0;
        if (count == 0) {
            if (save_) std::fill(s, s + m, T(0));
            return;
        }
        scratch.sort_positives(pairs);
        if (save_) scratch.weights.resize(m);
        scratch.pos_weights.assign(count, T(0));
        const double weight = row_weights_ ? row_weights_[i] : 1.0;
        const RowScore score = rule_.loss == Ranking::kFastAP ? histogram(s, weight) : ranks(s, weight);
        this->sums.template data_ptr<T>()[i] = static_cast<T>(weight * score.loss);
        counts[0] = static_cast<T>(score.loss) != T(0);
        if (!save_) return;
        for (int64_t k = 0; k < count; ++k) {
            s[scratch.columns[k]] = scratch.positives[k];
            scratch.weights[scratch.columns[k]] = scratch.pos_weights[k];
        }
        const double along = similarities_.kernels.write_row_weights(
            s, m, scratch.weights.data(), scratch.positives[0], similarities_.similarity.euclidean);
        if (this->grad_params.numel() == 0) return;
        // The loss depends on s / temperature, and not on a constant added to every s.
        double* by_params = this->grad_params.template data_ptr<double>() + 2 * i;
        by_params[0] = -along / rule_.temperature;
        by_params[1] = weight * score.by_temperature_k;
    }

    // ---- ranks ---------------------------------------------------------------------------------------------

    // 1 minus the mean of the positives' terms; their derivatives by both ranks.
    RowScore ranks(const T* s, double weight) {
        RankingScratch<T>& scratch = RankingScratch<T>::mine();
        const TripletKernels<T>& kernels = similarities_.kernels;
        const int64_t count = scratch.positives.size(), m = similarities_.m;
        const T inverse = static_cast<T>(1 / rule_.temperature);
        scratch.group_positives(inverse);
        scratch.far.resize(m);
        scratch.pos_far.resize(count);
        scratch.blocks.resize((m + kRankBlock - 1) / kRankBlock);
        kernels.rank_blocks(s, m, scratch.blocks.data());
        scratch.pos_ranks.assign(count, 1.0);
        scratch.pos_slopes.assign(count, 0.0);
        scratch.ranks.assign(count, 0.0);
        scratch.slopes.assign(count, 0.0);
        for (const RankGroup<T>& group : scratch.groups) {
            kernels.far_factors(s, m, group.centre, inverse, scratch.far.data());
            const int64_t j = group.first;
            kernels.add_ranks(among_columns(group, m, inverse), &scratch.ranks[j], &scratch.slopes[j]);
            for_other_positives(group, inverse, [&](int64_t k, const RowRanks<T>& others) {
                kernels.add_ranks(others, &scratch.pos_ranks[k], &scratch.pos_slopes[k]);
            });
        }
        RowScore score;
        const double share = 1.0 / static_cast<double>(count), scale = -weight * share / rule_.temperature;
        scratch.by_rank.resize(count);
        scratch.by_pos_rank.resize(count);
        double sum = 0;
        for (int64_t j = 0; j < count; ++j) {
            scratch.ranks[j] += scratch.pos_ranks[j];
            scratch.slopes[j] += scratch.pos_slopes[j];
            const RankTerm term = rank_term(scratch.ranks[j], scratch.pos_ranks[j]);
            sum += term.value;
            score.by_temperature_k -= share * term.by_temperature_k;
            scratch.by_rank[j] = normal(scale * term.by_rank);
            scratch.by_pos_rank[j] = normal(scale * term.by_pos_rank);
        }
        score.loss = 1 - share * sum;
        if (save_) weigh(s, inverse);
        return score;
    }

    // 0 for numbers whose products with the slopes would be subnormal, with which processors are slow: those of
    // positives whose rank is far beyond every cut-off.
    static T normal(double x) {
        constexpr double epsilon = std::numeric_limits<T>::epsilon();
        constexpr double least = std::numeric_limits<T>::min() / (epsilon * epsilon);
        return std::abs(x) < least ? T(0) : static_cast<T>(x);
    }

    RankTerm rank_term(double rank, double pos_rank) const {
        if (!rule_.possible()) return {std::numeric_limits<double>::quiet_NaN(), 0, 0, 0};
        if (rule_.loss == Ranking::kSmoothAP) return precision_at(rank, pos_rank);
        return found_at(rule_.cutoffs.data(), static_cast<int>(rule_.cutoffs.size()), rule_.temperature_k,
                        rank);
    }

    // The weights of the columns and of the positives, which are columns and have ranks of their own.
    void weigh(const T* s, T inverse) const {
        RankingScratch<T>& scratch = RankingScratch<T>::mine();
        const TripletKernels<T>& kernels = similarities_.kernels;
        const int64_t m = similarities_.m;
        std::fill(scratch.weights.begin(), scratch.weights.end(), T(0));
        // From the last on, whose factors are there.
        for (auto group = scratch.groups.rbegin(); group != scratch.groups.rend(); ++group) {
            // The ranks fall as the similarities ascend, so those that do not count come first.
            RankGroup<T> counts = *group;
            while (counts.first < counts.last && scratch.by_rank[counts.first] == T(0)) ++counts.first;
            if (counts.first == counts.last) continue;
            if (group != scratch.groups.rbegin())
                kernels.far_factors(s, m, counts.centre, inverse, scratch.far.data());
            kernels.add_rank_weights(among_columns(counts, m, inverse), &scratch.by_rank[counts.first],
                                     scratch.weights.data());
            for_other_positives(counts, inverse, [&](int64_t j, const RowRanks<T>& others) {
                const T by_both = scratch.by_rank[j] + scratch.by_pos_rank[j];
                kernels.add_rank_weights(others, &by_both, scratch.pos_weights.data());
            });
        }
        for (size_t j = 0; j < scratch.positives.size(); ++j) {
            const double by_own =
                scratch.by_rank[j] * scratch.slopes[j] + scratch.by_pos_rank[j] * scratch.pos_slopes[j];
            scratch.pos_weights[j] -= static_cast<T>(by_own);
        }
    }

    // The ranks of a group among all columns but the positives.
    RowRanks<T> among_columns(const RankGroup<T>& group, int64_t m, T inverse) const {
        const RankingScratch<T>& scratch = RankingScratch<T>::mine();
        return {scratch.far.data(),
                m,
                scratch.blocks.data(),
                &scratch.positives[group.first],
                &scratch.near[group.first],
                group.last - group.first,
                inverse};
    }

    // Calls visit(j, the ranks of positive j among the others) for every positive j of a group.
    template <typename Visit>
    void for_other_positives(const RankGroup<T>& group, T inverse, const Visit& visit) const {
        RankingScratch<T>& scratch = RankingScratch<T>::mine();
        const int64_t count = scratch.positives.size();
        for (int64_t k = 0; k < count; ++k)
            scratch.pos_far[k] = far_factor(scratch.positives[k], group.centre, inverse);
        constexpr T none = std::numeric_limits<T>::quiet_NaN();
        for (int64_t j = group.first; j < group.last; ++j) {
            const T own = std::exchange(scratch.pos_far[j], far_factor(none, group.centre, inverse));
            visit(j, RowRanks<T>{scratch.pos_far.data(), count, nullptr, &scratch.positives[j],
                                 &scratch.near[j], 1, inverse});
            scratch.pos_far[j] = own;
        }
    }

    // ---- a histogram ---------------------------------------------------------------------------------------

    // FastAP (Cakir et al., CVPR 2019): 1 minus the mean over the positives, each spread over two edges, of
    // the share of positives among what is at or below the edge.
    RowScore histogram(const T* s, double weight) {
        RankingScratch<T>& scratch = RankingScratch<T>::mine();
        const TripletKernels<T>& kernels = similarities_.kernels;
        const int64_t count = scratch.positives.size(), m = similarities_.m, edges = rule_.bins + 1;
        const T bins = static_cast<T>(rule_.bins);
        scratch.at_edge.assign(edges, 0.0);
        for (const T positive : scratch.positives) {
            const T place = bin_place(positive, bins);
            const int64_t bin = std::min<int64_t>(static_cast<int64_t>(place), rule_.bins - 1);
            const double beyond = static_cast<double>(place) - static_cast<double>(bin);
            scratch.at_edge[bin] += 1 - beyond;
            scratch.at_edge[bin + 1] += beyond;
        }
        scratch.below.assign(edges, 0.0);
        kernels.add_shares(s, m, bins, scratch.below.data());
        scratch.by_pos.assign(edges, 0.0);
        scratch.by_place.assign(rule_.bins, T(0));
        const double share = 1.0 / static_cast<double>(count);
        // Of the loss by the place of a column: it moves from the lower edge of its bin to the upper.
        double sum = 0, pos_below = 0;
        for (int64_t b = 0; b < edges; ++b) {
            const double here = scratch.at_edge[b];
            pos_below += here;
            const double all = pos_below + scratch.below[b];
            scratch.below[b] = 0;
            if (!(here * pos_below > 0)) continue;
            sum += here * pos_below / all;
            const double by_all = -here * pos_below / (all * all);
            scratch.by_pos[b] = pos_below / all;     // of a positive at this edge
            scratch.below[b] = here / all + by_all;  // of one at or below it
            if (b < rule_.bins) scratch.by_place[b] = static_cast<T>(by_all);
        }
        RowScore score;
        score.loss = 1 - share * sum;
        if (!save_) return score;
        // The place of s is (1 - s) bins / 2, and the loss falls as the sum grows.
        const double scale = weight * share * static_cast<double>(rule_.bins) / 2;
        for (T& by_place : scratch.by_place)
            by_place = static_cast<T>(-scale * static_cast<double>(by_place));
        kernels.share_weights(s, m, bins, scratch.by_place.data(), scratch.weights.data());
        for (int64_t k = 0; k < count; ++k) {
            const T place = bin_place(scratch.positives[k], bins);
            const int64_t bin = static_cast<int64_t>(place);
            if (static_cast<T>(bin) == place) continue;  // on an edge: no derivative
            const double by_place = scratch.by_pos[bin + 1] - scratch.by_pos[bin] - scratch.below[bin];
            scratch.pos_weights[k] = static_cast<T>(scale * by_place);
        }
        return score;
    }

    const LabelledSimilarities<T>& similarities_;
    const TripletParams<T> every_pair_ = all_distances<T>();
    const RankingRule rule_;
    const double* const row_weights_;
    const bool save_;
};

RowLossResult ranking_loss(const PairBatch& batch, const OptionalTensor& row_weights,
                           const OptionalTensor& dynamic_params, c10::string_view loss,
                           at::ArrayRef<double> params, c10::string_view similarity, bool save, bool save_ref,
                           bool save_params) {
    const TripletPoints points{batch, similarity};
    check_triplet_points(points);
    check_row_weights(row_weights, batch.embeddings.size(0), batch.embeddings);
    const RankingRule rule = ranking_rule(loss, params, dynamic_params, similarity);
    const Tensor weights = row_weights ? row_weights->to(at::kDouble).contiguous() : Tensor();
    const auto run = [&](auto number) -> RowLossResult {
        using T = decltype(number);
        const LabelledSimilarities<T> similarities(points);
        RankingRows<T> rows(similarities, rule, row_weights ? weights.const_data_ptr<double>() : nullptr,
                            save, save && save_params);
        auto [losses, counts, grad_emb, grad_ref, by_rows] =
            run_loss(similarities, rows, save, save_ref, batch.ref_emb ? batch.ref_emb->size(0) : 0);
        const Tensor by_params =
            save && save_params ? as_params(by_rows.sum(0), rule) : at::empty({0}, by_rows.options());
        return {losses, counts, grad_emb, grad_ref, by_params};
    };
    return batch.embeddings.scalar_type() == at::kDouble ? run(double()) : run(float());
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) { m.impl("ranking_loss", &FlatOp<&ranking_loss>::call); }

}  // namespace dml::cpu
