// A row's similarities among its positives: soft ranks, and soft histograms. A column that is none of the row's
// holds NaN, for which every comparison is false.

namespace dml::cpu::DML_ISA {

// The least and the greatest similarity of a block of columns, and how many count.
template <typename T>
DML_INLINE RankBlock<T> rank_block(const T* s, int64_t from, int64_t to) {
    T least = infinity<T>(), most = -infinity<T>(), count = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : count)
    for (int64_t k = from; k < to; ++k) {
        least = s[k] < least ? s[k] : least;
        most = s[k] > most ? s[k] : most;
        count += s[k] == s[k] ? T(1) : T(0);
    }
    return {least, most, count};
}

template <typename T>
void rank_blocks(const T* s, int64_t m, RankBlock<T>* blocks) {
    for (int64_t from = 0; from < m; from += kRankBlock)
        blocks[from / kRankBlock] = rank_block(s, from, from + kRankBlock < m ? from + kRankBlock : m);
}

template <typename T>
void far_factors(const T* s, int64_t m, T centre, T inverse, T* far) {
#pragma omp simd
    for (int64_t k = 0; k < m; ++k) far[k] = far_factor(s[k], centre, inverse);
}

// Calls visit(j, from, to) for the positives and blocks of columns whose sigmoids are not all 0 or 1, and
// above(j, count) for those where all are 1.
template <typename T, typename Above, typename Visit>
DML_INLINE void for_rank_blocks(const RowRanks<T>& row, const Above& above, const Visit& visit) {
    for (int64_t from = 0; from < row.m; from += kRankBlock) {
        const int64_t to = from + kRankBlock < row.m ? from + kRankBlock : row.m;
        for (int64_t j = 0; j < row.count; ++j) {
            if (row.blocks) {
                const RankBlock<T> block = row.blocks[from / kRankBlock];
                if ((block.most - row.positives[j]) * row.inverse < -kSaturated<T>) continue;
                if ((block.least - row.positives[j]) * row.inverse > kSaturated<T>) {
                    above(j, block.count);
                    continue;
                }
            }
            visit(j, from, to);
        }
    }
}

template <typename T>
void add_ranks(const RowRanks<T>& row, double* ranks, double* slopes) {
    const auto above = [&](int64_t j, T count) DML_INLINE_LAMBDA { ranks[j] += static_cast<double>(count); };
    for_rank_blocks(row, above, [&](int64_t j, int64_t from, int64_t to) DML_INLINE_LAMBDA {
        const T near = row.near[j];
        const T* far = row.far;
        T rank = 0, slope = 0;
#pragma omp simd reduction(+ : rank, slope)
        for (int64_t k = from; k < to; ++k) {
            const Logistic<T> step = Logistic<T>::of_exponential(near * far[k]);
            rank += step.value;
            slope += step.slope;
        }
        ranks[j] += static_cast<double>(rank);
        slopes[j] += static_cast<double>(slope);
    });
}

template <typename T>
void add_rank_weights(const RowRanks<T>& row, const T* by_rank, T* weights) {
    const auto above = [](int64_t, T) DML_INLINE_LAMBDA {};
    for_rank_blocks(row, above, [&](int64_t j, int64_t from, int64_t to) DML_INLINE_LAMBDA {
        const T near = row.near[j], factor = by_rank[j];
        const T* far = row.far;
#pragma omp simd
        for (int64_t k = from; k < to; ++k)
            weights[k] += factor * Logistic<T>::of_exponential(near * far[k]).slope;
    });
}

template <typename T>
void add_shares(const T* s, int64_t m, T bins, double* below) {
    alignas(64) T places[kSweep];
    for (int64_t from = 0; from < m; from += kSweep) {
        const int64_t size = from + kSweep < m ? kSweep : m - from;
#pragma omp simd
        for (int64_t k = 0; k < size; ++k) {
            const T place = bin_place(s[from + k], bins);
            places[k] = place == place ? place : bins + T(1);  // in no bin
        }
        for (int b = 0; b <= static_cast<int>(bins); ++b) {
            T sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < size; ++k) sum += share_below(places[k], static_cast<T>(b));
            below[b] += static_cast<double>(sum);
        }
    }
}

template <typename T>
void share_weights(const T* s, int64_t m, T bins, const T* by_place, T* weights) {
    const int32_t last = static_cast<int32_t>(bins) - 1;
#pragma omp simd
    for (int64_t k = 0; k < m; ++k) {
        const T place = bin_place(s[k], bins);
        const T known = place == place ? place : T(0);  // which is an edge, so without a derivative
        const int32_t bin = static_cast<int32_t>(known);
        weights[k] = static_cast<T>(bin) < known ? by_place[bin < last ? bin : last] : T(0);
    }
}

template <typename T>
double write_row_weights(T* s, int64_t m, T* weights, T centre, bool euclidean) {
    double along = 0;
    for (int64_t from = 0; from < m; from += kSweep) {
        const int64_t to = from + kSweep < m ? from + kSweep : m;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = from; k < to; ++k) {
            weights[k] = s[k] == s[k] ? weights[k] : T(0);
            sum += weights[k] != T(0) ? (s[k] - centre) * weights[k] : T(0);
        }
        along += static_cast<double>(sum);
        write_weights(s, from, to, weights + from, euclidean);
    }
    return along;
}

}  // namespace dml::cpu::DML_ISA
