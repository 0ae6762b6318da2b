// What the kernels know about a row: its points, its norm, its statistics, and the end of its loss.
#pragma once

#include "../row_stats.h"
#include "copy.cuh"

namespace dml::cuda {

// How many of `rows` rows take part: as many as *count says, or all.
DML_DEVICE int64_t rows_in_use(const int64_t* count, int64_t rows) {
    if (!count) return rows;
    return *count < 0 ? 0 : *count < rows ? *count : rows;
}

template <typename T, typename Acc>
struct Rows {
    Matrix<T> points;       // [count, dim]
    const int64_t* labels;  // [count]
    Acc* inverse_norms;     // [count] NaN for a row that is not finite, 0 for a row of norm 0
    const int64_t* used;    // how many take part, on the device; null: all

    // Those that take part. What a kernel does with the others it does with what lies past the end.
    DML_DEVICE Rows in_use() const {
        Rows some = *this;
        some.points.rows = rows_in_use(used, points.rows);
        return some;
    }
};

// The saved statistics: one array for each quantity, so that neighbouring threads read neighbours.
template <typename Acc>
struct RowStats {
    Acc* scale;  // [1] the reduction's factor; NaN where the inputs are not finite
    Acc *neg_above, *pos_below, *lse_neg, *lse_pos, *weight_neg, *weight_pos;  // [rows] each
    int32_t* flags;                                                            // [rows]
};
inline constexpr int kStatsHeader = 4;
inline constexpr int kStatsPerRow = 6;
inline constexpr int kEligible = 1;  // the labels give the row the pairs that its loss needs
inline constexpr int kHasLoss = 2;   // and what was kept of them is enough for it
inline constexpr int kValid = 4;     // some pair was kept; without mining, the row has a pair

template <typename Acc>
RowStats<Acc> row_stats(void* stats, int32_t* flags, int64_t rows) {
    Acc* base = static_cast<Acc*>(stats);
    Acc* a = base + kStatsHeader;
    return {base, a, a + rows, a + 2 * rows, a + 3 * rows, a + 4 * rows, a + 5 * rows, flags};
}

template <typename Acc>
DML_DEVICE Acc not_a_number() {
    return std::numeric_limits<Acc>::quiet_NaN();
}
template <typename Acc>
DML_DEVICE bool is_finite(Acc x) {
    return x - x == Acc(0);
}

// ---- over a warp; every lane gets the same bits, since each step adds the same two numbers ------------

template <typename T>
DML_DEVICE T warp_sum(T x) {
#pragma unroll
    for (int m = kWarpSize / 2; m > 0; m /= 2) x += shfl_xor(x, m);
    return x;
}
template <typename T>
DML_DEVICE T warp_max(T x) {
#pragma unroll
    for (int m = kWarpSize / 2; m > 0; m /= 2) {
        const T other = shfl_xor(x, m);
        x = other > x ? other : x;
    }
    return x;
}
template <typename T>
DML_DEVICE T warp_min(T x) {
    return -warp_max(-x);
}

// ---- norms and similarities ---------------------------------------------------------------------------

// For a row whose sum of squares overflowed: scaled by its largest element, it cannot.
template <typename Acc, typename T>
DML_DEVICE Acc scaled_inverse_norm(const Matrix<T>& m, int64_t row) {
    const T* x = m.data + row * m.stride;
    Acc largest = 0;
    for (int64_t d = 0; d < m.cols; ++d) {
        const Acc a = std::fabs(Acc(x[d]));
        if (!is_finite(a)) return not_a_number<Acc>();
        largest = a > largest ? a : largest;
    }
    Acc squares = 0;
    for (int64_t d = 0; d < m.cols; ++d) {
        const Acc a = Acc(x[d]) / largest;
        squares += a * a;
    }
    return Acc(1) / largest / std::sqrt(squares);
}

template <typename Acc, typename T>
DML_DEVICE Acc inverse_norm(Acc squares, const Matrix<T>& m, int64_t row, bool normalize) {
    if (!normalize) return is_finite(squares) ? Acc(1) : not_a_number<Acc>();
    if (!is_finite(squares)) return scaled_inverse_norm<Acc>(m, row);
    const Acc norm = std::sqrt(squares);
    return norm > Acc(1e-12) ? Acc(1) / norm : Acc(0);
}

// For rows so long that their bare dot product overflows, or the product of their inverse norms vanishes.
template <typename Acc, typename T>
DML_DEVICE Acc scaled_similarity(const Matrix<T>& a, int64_t i, Acc inv_a, const Matrix<T>& b, int64_t j,
                                 Acc inv_b) {
    const T* x = a.data + i * a.stride;
    const T* y = b.data + j * b.stride;
    Acc sum = 0;
    for (int64_t d = 0; d < a.cols; ++d) sum += (Acc(x[d]) * inv_a) * (Acc(y[d]) * inv_b);
    return sum;
}

// The similarity of two rows from their bare dot product, symmetric to the bit; or NaN where it takes
// careful_similarity to tell.
template <typename Acc>
DML_DEVICE Acc quick_similarity(Acc dot, Acc inv_a, Acc inv_b) {
    const Acc scale = inv_a * inv_b;
    const bool plain = is_finite(dot) && scale >= Acc(sizeof(Acc) == 8 ? 1e-290 : 1e-30);
    return plain ? dot * scale : not_a_number<Acc>();
}

// 0 for a row of norm 0. Also 0 for a row that is not finite: the whole batch becomes NaN in the end, and
// until then the statistics that only labels should decide stay meaningful.
template <typename Acc, typename T>
DML_DEVICE Acc careful_similarity(const Matrix<T>& a, int64_t i, Acc inv_a, const Matrix<T>& b, int64_t j,
                                  Acc inv_b) {
    if (inv_a == Acc(0) || inv_b == Acc(0) || !is_finite(inv_a) || !is_finite(inv_b)) return Acc(0);
    return scaled_similarity(a, i, inv_a, b, j, inv_b);
}

// ---- the loss of a row, and the gradient of a pair -----------------------------------------------------

// The least similar positive and the most similar negative.
template <typename Acc>
struct Extremes {
    Acc min_pos = infinity<Acc>(), max_neg = -infinity<Acc>();

    DML_DEVICE void add(bool positive, Acc s) {
        if (positive) {
            min_pos = s < min_pos ? s : min_pos;
        } else {
            max_neg = s > max_neg ? s : max_neg;
        }
    }
    DML_DEVICE void merge(const Extremes& other) {
        min_pos = other.min_pos < min_pos ? other.min_pos : min_pos;
        max_neg = other.max_neg > max_neg ? other.max_neg : max_neg;
    }
    DML_DEVICE bool has_both() const { return min_pos != infinity<Acc>() && max_neg != -infinity<Acc>(); }

    // The mining rule; a row that lacks either kind keeps nothing. Rounding of the two bounds must not keep
    // pairs of one kind only.
    DML_DEVICE Bounds<Acc> mined(Acc epsilon) const {
        const Bounds<Acc> bounds = {max_neg + epsilon, min_pos - epsilon};
        return min_pos < bounds.pos_below && max_neg > bounds.neg_above ? bounds : Bounds<Acc>::none();
    }
};

// A row is finished from both log-sum-exps over what its bounds kept. had_both: so says mining, of the pairs
// before it; without mining every pair was kept, so what is empty the labels did not give.
template <typename Loss, typename Acc>
DML_DEVICE void finish_row(const RowStats<Acc>& stats, int64_t i, const Loss& loss, Bounds<Acc> bounds,
                           LogSumExp<Acc> pos, LogSumExp<Acc> neg, bool mining, bool had_both) {
    const bool valid = !pos.empty() || !neg.empty();
    const bool has_loss = Loss::kNeedsBoth ? !pos.empty() && !neg.empty() : valid;
    const bool eligible = mining ? had_both : has_loss;
    if (!has_loss) {
        bounds = Bounds<Acc>::none();
        pos = neg = LogSumExp<Acc>{};
    }
    const Acc lse_pos = pos.value(Loss::kCountsOne), lse_neg = neg.value(Loss::kCountsOne);
    const PosNeg<Acc> weight = has_loss ? loss.dloss_dlse(lse_pos, lse_neg) : PosNeg<Acc>{Acc(0), Acc(0)};
    stats.neg_above[i] = bounds.neg_above;
    stats.pos_below[i] = bounds.pos_below;
    stats.lse_neg[i] = lse_neg;
    stats.lse_pos[i] = lse_pos;
    stats.weight_neg[i] = weight.neg;
    stats.weight_pos[i] = weight.pos;
    stats.flags[i] = (eligible ? kEligible : 0) | (has_loss ? kHasLoss : 0) | (valid ? kValid : 0);
}

// A finished row's loss. It is not stored: that would be one more number a row.
template <typename Loss, typename Acc>
DML_DEVICE Acc row_loss(const RowStats<Acc>& stats, int64_t i, const Loss& loss) {
    return stats.flags[i] & kHasLoss ? loss.loss(stats.lse_pos[i], stats.lse_neg[i]) : Acc(0);
}

// What backward needs of one row, before its upstream gradient.
template <typename Acc>
struct RowWeight {
    Bounds<Acc> bounds;
    Acc lse_pos, lse_neg, weight_pos, weight_neg;

    static DML_DEVICE RowWeight load(const RowStats<Acc>& s, int64_t i) {
        return {
            {s.pos_below[i], s.neg_above[i]}, s.lse_pos[i], s.lse_neg[i], s.weight_pos[i], s.weight_neg[i]};
    }

    DML_DEVICE void scale(Acc upstream) {
        weight_pos *= upstream;
        weight_neg *= upstream;
    }

    // dL_i/ds without its last factor, the slope; exactly 0 where the pair was not kept.
    template <typename Loss>
    DML_DEVICE Acc of(const Loss& loss, bool positive, Acc s) const {
        if (positive) {
            return s < bounds.pos_below ? weight_pos * std::exp(loss.logit_pos(s) - lse_pos) : Acc(0);
        }
        return s > bounds.neg_above ? weight_neg * std::exp(loss.logit_neg(s) - lse_neg) : Acc(0);
    }
};

}  // namespace dml::cuda
