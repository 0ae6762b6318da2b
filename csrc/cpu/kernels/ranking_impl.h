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

// Adds the columns of one block to the ranks of a positive.
template <typename T>
DML_INLINE void add_block_ranks(const RowRanks<T>& row, int64_t from, int64_t to, T positive, double& rank,
                                double& slope) {
    const T* s = row.s;
    const T inverse = row.inverse;
    T ranks = 0, slopes = 0;
#pragma omp simd reduction(+ : ranks, slopes)
    for (int64_t k = from; k < to; ++k) {
        const Logistic<T> step((s[k] - positive) * inverse);
        const bool counts = s[k] == s[k];
        ranks += counts ? step.value : T(0);
        slopes += counts ? step.slope : T(0);
    }
    rank += static_cast<double>(ranks);
    slope += static_cast<double>(slopes);
}

template <typename T>
void add_ranks(const RowRanks<T>& row, double* ranks, double* slopes) {
    for (int64_t from = 0; from < row.m; from += kRankBlock) {
        const int64_t to = from + kRankBlock < row.m ? from + kRankBlock : row.m;
        const RankBlock<T> block = row.blocks[from / kRankBlock];
        for (int64_t j = 0; j < row.count; ++j) {
            const T positive = row.positives[j];
            if ((block.most - positive) * row.inverse < -kSaturated<T>) continue;
            if ((block.least - positive) * row.inverse > kSaturated<T>) {
                ranks[j] += static_cast<double>(block.count);
            } else {
                add_block_ranks(row, from, to, positive, ranks[j], slopes[j]);
            }
        }
    }
}

template <typename T>
void add_rank_weights(const RowRanks<T>& row, const T* by_rank, T* weights) {
    const T* s = row.s;
    const T inverse = row.inverse;
    for (int64_t from = 0; from < row.m; from += kRankBlock) {
        const int64_t to = from + kRankBlock < row.m ? from + kRankBlock : row.m;
        const RankBlock<T> block = row.blocks[from / kRankBlock];
        for (int64_t j = 0; j < row.count; ++j) {
            const T positive = row.positives[j], factor = by_rank[j];
            const bool below = (block.most - positive) * inverse < -kSaturated<T>;
            if (below || (block.least - positive) * inverse > kSaturated<T>) continue;
#pragma omp simd
            for (int64_t k = from; k < to; ++k) {
                const T slope = Logistic<T>((s[k] - positive) * inverse).slope;
                weights[k] += s[k] == s[k] ? factor * slope : T(0);
            }
        }
    }
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
double write_row_weights(T* s, int64_t m, const T* weights, T centre, bool euclidean) {
    double along = 0;
    for (int64_t from = 0; from < m; from += kSweep) {
        const int64_t to = from + kSweep < m ? from + kSweep : m;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = from; k < to; ++k) sum += weights[k] != T(0) ? (s[k] - centre) * weights[k] : T(0);
        along += static_cast<double>(sum);
        write_weights(s, from, to, weights + from, euclidean);
    }
    return along;
}

}  // namespace dml::cpu::DML_ISA
