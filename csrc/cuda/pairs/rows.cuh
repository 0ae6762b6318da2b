// Rows of points: norms, and the similarity of two rows.
#pragma once

#include "core/numeric.h"
#include "core/problem.h"
#include "core/tiny_norm.h"
#include "cuda/common/copy.cuh"

namespace dml::cuda {

// How many of `rows` rows are in use: *count, or all.
DML_DEVICE int64_t rows_in_use(const int64_t* count, int64_t rows) {
    if (!count) return rows;
    return *count < 0 ? 0 : *count < rows ? *count : rows;
}

template <typename T, typename Acc>
struct Rows {
    Matrix<T> points;       // [count, dim]
    const int64_t* labels;  // [count]
    Acc* norms;             // [count] of row_norm
    const int64_t* used;    // how many are in use, in device memory; null: all

    // The rows in use; kernels treat the others as past the end.
    DML_DEVICE Rows in_use() const {
        Rows result = *this;
        result.points.rows = rows_in_use(used, points.rows);
        return result;
    }
};

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
        const T y = shfl_xor(x, m);
        x = y > x ? y : x;
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

// 1 / |q|, or 0 for a row of norm 0; where rows are not normalised 1, or |q|^2 for distances. NaN for a row
// that is not finite.
template <typename Acc, typename T>
DML_DEVICE Acc row_norm(Acc squares, const Matrix<T>& m, int64_t row, Similarity kind) {
    if (!kind.normalize) {
        return !is_finite(squares) ? not_a_number<Acc>() : kind.euclidean ? squares : Acc(1);
    }
    if (!is_finite(squares)) {
        return scaled_inverse_norm<Acc>(m, row);
    }
    const Acc norm = std::sqrt(squares);
    return norm > Acc(kTinyNorm) ? Acc(1) / norm : Acc(0);
}

// Whether the product of two such inverse norms nears the end of the range. Weights are then multiplied by
// long_rows_range().
template <typename Acc>
DML_DEVICE bool is_very_long(Acc norm) {
    return norm > Acc(0) && norm < Acc(sizeof(Acc) == 8 ? 1e-100 : 1e-12);
}
template <typename Acc>
DML_DEVICE Acc long_rows_range() {
    return sizeof(Acc) == 8 ? Acc(0x1p600) : Acc(0x1p80);
}

// The factor that turns a row into the compared one.
template <typename Acc>
DML_DEVICE Acc unit_factor(Acc norm, Similarity kind) {
    return kind.normalize || norm != norm ? norm : Acc(1);
}

// Distances below an eighth of the rows' own lengths have lost too many digits to the difference
// |x|^2 + |y|^2 - 2 xy.
template <typename Acc>
inline constexpr Acc kNearSquare = Acc(1) / Acc(64);

// The similarity of two rows from their dot product, symmetric to the bit; NaN where careful_similarity is
// needed.
template <typename Acc>
DML_DEVICE Acc quick_similarity(Similarity kind, Acc dot, Acc norm_a, Acc norm_b) {
    if (kind.euclidean && !kind.normalize) {
        const Acc both = norm_a + norm_b, square = both - Acc(2) * dot;
        return is_finite(square) && square > kNearSquare<Acc> * both ? -std::sqrt(square)
                                                                     : not_a_number<Acc>();
    }
    const Acc scale = norm_a * norm_b;
    const bool plain = is_finite(dot) && scale >= Acc(sizeof(Acc) == 8 ? 1e-290 : 1e-30);
    if (!plain) return not_a_number<Acc>();
    if (kind.euclidean) {
        const Acc square = Acc(2) - Acc(2) * (dot * scale);
        return square > Acc(2) * kNearSquare<Acc> ? -std::sqrt(square) : not_a_number<Acc>();
    }
    return dot * scale;
}

// One pair by a warp, from the rows themselves: for near rows, and for rows so long that their dot product
// overflows or the product of their inverse norms underflows. 0 for a row that is not finite: the batch
// becomes NaN in the end, and until then row stats that depend on labels alone stay right.
template <typename Acc, typename T>
DML_DEVICE Acc careful_similarity(Similarity kind, const Matrix<T>& a, int64_t i, Acc norm_a,
                                  const Matrix<T>& b, int64_t j, Acc norm_b) {
    if (!is_finite(norm_a) || !is_finite(norm_b)) return Acc(0);
    const Acc unit_a = unit_factor(norm_a, kind), unit_b = unit_factor(norm_b, kind);
    const T* x = a.data + i * a.stride;
    const T* y = b.data + j * b.stride;
    Acc sum = 0;
#pragma unroll 1
    for (int64_t d = lane_id(); d < a.cols; d += kWarpSize) {
        const Acc u = Acc(x[d]) * unit_a, v = Acc(y[d]) * unit_b;
        sum += kind.euclidean ? (u - v) * (u - v) : u * v;
    }
    sum = warp_sum(sum);
    return kind.euclidean ? -std::sqrt(sum) : sum;
}

}  // namespace dml::cuda
