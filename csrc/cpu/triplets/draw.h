// Negatives of a row for many positives: drawn by distance, or the hardest beyond a distance.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/kernels/triplet_kernels.h"

namespace dml::cpu::triplet {

// Draws a negative for each uniform number in (0, 1), by the weights of the distances.
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
        // The first block whose cumulative weight exceeds the target.
        const auto end = std::upper_bound(below_.begin() + 1, below_.end() - 1, target);
        int64_t block = end - (below_.begin() + 1);
        while (below_[block + 1] == below_[block])
            --block;  // after rounding, the last blocks may have no weight
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
    std::vector<double> below_;  // [blocks + 1] cumulative weights of the blocks
};

// The hardest negative farther than a positive: by a scan, or by binary search among sorted negatives if many
// calls follow.
template <typename T>
class Semihard {
   public:
    void prepare(const TripletKernels<T>& kernels, const T* s, int64_t m, int64_t calls) {
        kernels_ = &kernels;
        s_ = s;
        m_ = m;
        sorted_.clear();
        is_sorted_ = calls > 256;
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

}  // namespace dml::cpu::triplet
