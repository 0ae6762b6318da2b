// The ranking loss of a row, by one thread block: its positives are gathered into a workspace and each is
// compared with every column; or all columns are spread over the edges of a histogram.
#pragma once

#include "cuda/triplets/enumerate.cuh"
#include "cuda/triplets/row.cuh"

namespace dml::cuda {

// What a row's loss is but for its weight, the same in every thread.
struct RankingScore {
    double loss = 0, by_temperature_k = 0;
};

// A row, and where its weights are gathered. The workspace's `derivative` holds those of its positives.
template <typename T>
struct RankingRow : TripletRow<T> {
    const RankingRules& rules;
    double weight;  // of the row

    DML_DEVICE explicit RankingRow(const RankingRules& of) : rules(of) {}

    // Adds the ranks of positive k: the sums of the sigmoid and of its derivative over the negatives.
    DML_DEVICE void ranks_of(int64_t k, T inverse, double& rank, double& slope, double& pos_rank,
                             double& pos_slope) const {
        const T positive = -this->work.d[k];
        T ranks = 0, slopes = 0, pos_ranks = 0, pos_slopes = 0;
        for (int64_t j = threadIdx.x; j < this->columns; j += kTripletThreads) {
            const T s = this->s[j];
            if (!(s == s)) continue;
            const Logistic<T> step((s - positive) * inverse);
            ranks += step.value;
            slopes += step.slope;
        }
        for (int64_t j = threadIdx.x; j < this->count; j += kTripletThreads) {
            if (j == k) continue;
            const Logistic<T> step((-this->work.d[j] - positive) * inverse);
            pos_ranks += step.value;
            pos_slopes += step.slope;
        }
        pos_rank = 1 + merge_sum(double(pos_ranks));
        pos_slope = merge_sum(double(pos_slopes));
        rank = pos_rank + merge_sum(double(ranks));
        slope = pos_slope + merge_sum(double(slopes));
    }

    DML_DEVICE RankTerm rank_term(double rank, double pos_rank) const {
        if (!rules.possible) return {not_a_number<double>(), 0, 0, 0};
        if (rules.loss == Ranking::kSmoothAP) return precision_at(rank, pos_rank);
        return found_at(rules.cutoffs, rules.cutoff_count, rules.temperature_k, rank);
    }

    // The derivative by the rank of each positive is left in `prefix`.
    DML_DEVICE RankingScore by_ranks() {
        const T inverse = T(1 / rules.temperature);
        const double share = 1.0 / double(this->count), scale = -weight * share / rules.temperature;
        double* const derivative = this->work.derivative;
        RankingScore score;
        double sum = 0;
        for (int64_t k = 0; k < this->count; ++k) {
            double rank, slope, pos_rank, pos_slope;
            ranks_of(k, inverse, rank, slope, pos_rank, pos_slope);
            const RankTerm term = rank_term(rank, pos_rank);
            sum += term.value;
            score.by_temperature_k -= share * term.by_temperature_k;
            const double by_rank = scale * term.by_rank, by_pos_rank = scale * term.by_pos_rank;
            if (threadIdx.x == 0) this->work.prefix[k] = by_rank;
            // A thread owns the derivatives of its positives.
            for (int64_t j = threadIdx.x; j < this->count; j += kTripletThreads) {
                const double by_own = by_rank * slope + by_pos_rank * pos_slope;
                const Logistic<T> step((this->work.d[k] - this->work.d[j]) * inverse);
                derivative[j] += j == k ? -by_own : (by_rank + by_pos_rank) * double(step.slope);
            }
        }
        score.loss = 1 - share * sum;
        block_sync();
        return score;
    }

    DML_DEVICE T weight_by_ranks(int64_t j) const {
        const T s = this->s[j], inverse = T(1 / rules.temperature);
        T sum = 0;
        if (s == s) {
            for (int64_t k = 0; k < this->count; ++k)
                sum += T(this->work.prefix[k]) * Logistic<T>((s + this->work.d[k]) * inverse).slope;
        }
        return sum;
    }

    // The derivatives by the place of a column within each bin are left in `prefix`.
    DML_DEVICE RankingScore by_histogram() {
        const T bins = T(rules.bins);
        const int64_t edges = rules.bins + 1;
        double* const by_place = this->work.prefix;
        double *const by_pos = by_place + edges, *const by_below = by_pos + edges;
        const double share = 1.0 / double(this->count);
        double sum = 0, pos_below = 0;
        for (int64_t b = 0; b < edges; ++b) {
            T positives = 0, others = 0;
            for (int64_t k = threadIdx.x; k < this->count; k += kTripletThreads) {
                const T apart = bin_place(-this->work.d[k], bins) - T(b);
                const T pulse = T(1) - (apart < T(0) ? -apart : apart);
                positives += pulse > T(0) ? pulse : T(0);
            }
            for (int64_t j = threadIdx.x; j < this->columns; j += kTripletThreads) {
                const T s = this->s[j];
                others += s == s ? share_below(bin_place(s, bins), T(b)) : T(0);
            }
            const double here = merge_sum(double(positives));
            pos_below += here;
            const double all = pos_below + merge_sum(double(others));
            const bool counts = here * pos_below > 0;
            const double by_all = counts ? -here * pos_below / (all * all) : 0.0;
            sum += counts ? here * pos_below / all : 0.0;
            if (threadIdx.x != 0) continue;
            by_place[b] = by_all;
            by_pos[b] = counts ? pos_below / all : 0.0;        // of a positive at this edge
            by_below[b] = counts ? here / all + by_all : 0.0;  // of one at or below it
        }
        block_sync();
        RankingScore score;
        score.loss = 1 - share * sum;
        const double scale = bin_scale();
        for (int64_t k = threadIdx.x; k < this->count; k += kTripletThreads) {
            const T place = bin_place(-this->work.d[k], bins);
            const int64_t bin = int64_t(place);
            const bool edge = T(bin) == place;
            this->work.derivative[k] =
                edge ? 0.0 : scale * (by_pos[edge ? bin : bin + 1] - by_pos[bin] - by_below[bin]);
        }
        block_sync();
        return score;
    }
    // The place of s is (1 - s) bins / 2, and the loss falls as the sum over the edges grows.
    DML_DEVICE double bin_scale() const { return weight / double(this->count) * double(rules.bins) / 2; }

    DML_DEVICE T weight_by_histogram(int64_t j) const {
        const T s = this->s[j];
        if (!(s == s)) return T(0);
        const T place = bin_place(s, T(rules.bins));
        const int64_t bin = int64_t(place);
        return T(bin) == place ? T(0) : T(-bin_scale() * this->work.prefix[bin]);
    }
};

template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    ranking_row_losses(TripletRowBlock<T> row_block, RankingRules rules, const double* row_weights, T* losses,
                       int64_t* counts, double* by_params, unsigned char* workspace, int64_t capacity,
                       int64_t space, int64_t work_bytes) {
    RankingRow<T> row(rules);
    row.params = all_distances<T>();
    row.work = TripletWork<T>::at(workspace + blockIdx.x * work_bytes, capacity, space);
    for (int64_t r = blockIdx.x; r < row_block.rows; r += gridDim.x) {
        row.s = row_block.s + r * row_block.pitch;
        row.i = row_block.first + r;
        row.load(row_block);
        row.weight = row_weights ? row_weights[row.i] : 1.0;
        const bool bins = rules.loss == Ranking::kFastAP;
        for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) row.work.derivative[k] = 0;
        block_sync();
        RankingScore score;
        if (row.count > 0) score = bins ? row.by_histogram() : row.by_ranks();
        double along = 0;  // of the weights and the similarities, measured from the first positive
        if (rules.write) {
            const T centre = row.count > 0 ? -row.work.d[0] : T(0);
            for (int64_t j = threadIdx.x; j < row_block.columns; j += kTripletThreads) {
                const T s = j < row.columns ? row.s[j] : T(0);
                T weight = T(0);
                if (row.count > 0 && j < row.columns)
                    weight = bins ? row.weight_by_histogram(j) : row.weight_by_ranks(j);
                if (weight != T(0)) along += double((s - centre) * weight);
                row.s[j] = weight != T(0) ? weight * inverse_distance(rules.euclidean, -s) : T(0);
            }
            block_sync();
            for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) {
                const T d = row.work.d[k], weight = T(row.work.derivative[k]);
                along += double((-d - centre) * weight);
                row.s[row.work.column[k]] = weight * inverse_distance(rules.euclidean, d);
            }
        }
        along = merge_sum(along);
        if (threadIdx.x != 0) continue;
        losses[row.i] = T(row.weight * score.loss);
        counts[2 * row.i] = T(score.loss) != T(0);
        counts[2 * row.i + 1] = row.count > 0;
        if (!by_params) continue;
        // The loss depends on s / temperature, and not on a constant added to every s.
        by_params[2 * row.i] = -along / rules.temperature;
        by_params[2 * row.i + 1] = row.weight * score.by_temperature_k;
    }
}

}  // namespace dml::cuda
