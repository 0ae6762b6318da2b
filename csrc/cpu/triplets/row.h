// The positives and negatives of a row, and the selection among them.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "cpu/triplets/draw.h"
#include "cpu/triplets/row_block.h"

namespace dml::cpu::triplet {

// Memory for a row, kept by each thread.
template <typename T>
struct RowScratch {
    std::vector<int32_t> columns;  // of the chosen positives
    std::vector<T> distances;      // of the chosen positives, then padding
    std::vector<std::pair<T, int32_t>> sorted;
    std::vector<double> prefix, derivative;
    std::vector<int32_t> steps;
    Draw<T> draw;
    Semihard<T> semihard;

    static RowScratch& mine() {
        static thread_local RowScratch scratch;
        return scratch;
    }
};

// The positives and negatives of row i.
template <typename T>
class RowPairs {
   public:
    // s: [m] the row's similarities. Positives, and negatives out of range, become NaN.
    RowPairs(const LabelledSimilarities<T>& similarities, const TripletParams<T>& params, int64_t i, T* s)
        : similarities_(similarities), params_(params), i_(i), s_(s), scratch_(RowScratch<T>::mine()) {
        auto& columns = scratch_.columns;
        auto& distances = scratch_.distances;
        columns.clear();
        distances.clear();
        const int64_t self = similarities.self_col(i);
        for (const int32_t j : similarities.same_label(i)) {
            const T d = -s[j];
            s[j] = std::numeric_limits<T>::quiet_NaN();
            if (j == self || !params.positive_allowed(d)) continue;
            columns.push_back(j);
            distances.push_back(d);
        }
        negatives_ = similarities.m - similarities.same_label(i).size();
        const bool bounded = params.neg_low > -infinity<T>() || params.neg_high < infinity<T>();
        if (bounded) negatives_ = similarities.kernels.keep_allowed(s, similarities.m, params);
    }

    int64_t positives() const { return static_cast<int64_t>(scratch_.columns.size()); }
    int64_t negatives() const { return negatives_; }
    int64_t column(int64_t k) const { return scratch_.columns[k]; }
    T distance(int64_t k) const { return scratch_.distances[k]; }
    RowScratch<T>& scratch() const { return scratch_; }

    // The index of the farthest or nearest positive, the first among equals, or -1.
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

    // Before `calls` calls of negative().
    void prepare(Selection which, int64_t calls, uint64_t seed) {
        if (calls == 0) return;
        seed_ = seed;
        if (which == Selection::kHardest)
            fixed_ = similarities_.kernels.largest(s_, similarities_.m, infinity<T>());
        if (which == Selection::kEasiest) fixed_ = similarities_.kernels.smallest(s_, similarities_.m);
        if (which == Selection::kSemihard)
            scratch_.semihard.prepare(similarities_.kernels, s_, similarities_.m, calls);
        if (which == Selection::kDrawn)
            scratch_.draw.prepare(similarities_.kernels, s_, similarities_.m, params_);
    }
    // The column of the negative for the k-th positive, at distance d_pos; or -1.
    int64_t negative(Selection which, int64_t k, T d_pos) const {
        if (which == Selection::kSemihard) return scratch_.semihard.column(d_pos);
        if (which == Selection::kDrawn) return scratch_.draw.column(uniform_draw(seed_, i_, k));
        return fixed_;
    }

   private:
    const LabelledSimilarities<T>& similarities_;
    const TripletParams<T>& params_;
    const int64_t i_;
    T* const s_;
    RowScratch<T>& scratch_;
    int64_t negatives_ = 0, fixed_ = -1;
    uint64_t seed_ = 0;
};

// The seed of the draws; 0 without one.
inline uint64_t seed_value(const OptionalTensor& seed) {
    return seed ? static_cast<uint64_t>(seed->item<int64_t>()) : 0;
}

}  // namespace dml::cpu::triplet
