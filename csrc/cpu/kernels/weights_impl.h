// Backward: the weights dL/ds of the pairs of a tile.

namespace dml::cpu::DML_ISA {

// One side of a tile, as the weights of one kind of pair see it: the row states and derivatives of its lines.
template <typename T>
struct WeightLines {
    const T *bound, *value, *d, *context;  // [lines]
};

// Log-sum-exps weigh a pair by d exp(term - value). Where the values of all lines are close, that is
// exp(term - offset) (d exp(offset - value)), with one exponential for both sides.
template <typename T>
struct SharedExponential {
    alignas(64) T rows[kMostSide], cols[kMostSide];  // d exp(offset - value)
    T offset;
    bool valid;

    DML_INLINE SharedExponential(const WeightLines<T>& row, int n, const WeightLines<T>& col, int m) {
        Spread<T> spread;
        spread.add(row.value, n);
        spread.add(col.value, m);
        offset = spread.largest;
        valid = !spread.empty() && spread.narrow();
        if (!valid) return;
        fill(rows, row, n);
        fill(cols, col, m);
    }
    // A line without pairs (value -inf) has a factor that no pair uses.
    DML_INLINE void fill(T* factor, const WeightLines<T>& lines, int n) const {
        for (int64_t i = 0; i < n; ++i) factor[i] = lines.d[i] * exp_fast(offset - lines.value[i]);
    }
};

// ---- the weights of one kind of pair, in a range of row i -------------------------------------------------
// kAdd: added to out, else written. The coefficients of the pairs, dL/dterm, go to the sums for parameters.

// Sums: d derivative(s), with each side's context where the formula has one.
template <typename T, bool kBothSides, bool kAdd, typename Kind, typename Sums>
DML_INLINE void range_sum_weights(const Kind& kind, const T* s, int64_t begin, int64_t end, int i,
                                  const WeightLines<T>& row, const WeightLines<T>& col, T* out,
                                  const Sums& sums) {
    const T bound = row.bound[i], d = row.d[i];
    const T context = Kind::kContext ? row.context[i] : T(0);
    if constexpr (Sums::kLearns) {
        constexpr bool kApart = kBothSides && Kind::kContext;  // each side's terms are its own
        alignas(64) T coefficient[kMostSide], of_cols[kApart ? kMostSide : 1];
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) {
            coefficient[j] = kind.kept(s[j], bound) ? d : T(0);
            if constexpr (kBothSides) {
                const T col_d = kind.kept(s[j], col.bound[j]) ? col.d[j] : T(0);
                if constexpr (kApart) {
                    of_cols[j] = col_d;
                } else {
                    coefficient[j] += col_d;
                }
            }
        }
        sums.template add<kAdd>(kind, s, coefficient, begin, end, out, SameContext<T>{context});
        if constexpr (kApart)
            sums.template add<true>(kind, s, of_cols, begin, end, out, ColumnContext<T>{col.context});
        return;
    }
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
        const T row_d = kind.kept(s[j], bound) ? d : T(0);
        T total = T(0);
        if constexpr (Kind::kContext) {
            total = row_d != T(0) ? row_d * kind.derivative(s[j], context) : T(0);
            if constexpr (kBothSides) {
                const T col_d = kind.kept(s[j], col.bound[j]) ? col.d[j] : T(0);
                total += col_d != T(0) ? col_d * kind.derivative(s[j], col.context[j]) : T(0);
            }
        } else {
            total = row_d;
            if constexpr (kBothSides) total += kind.kept(s[j], col.bound[j]) ? col.d[j] : T(0);
            total = total != T(0) ? total * kind.derivative(s[j], T(0)) : T(0);
        }
        out[j] = kAdd ? out[j] + total : total;
    }
}

// Log-sum-exps, both sides with one exponential.
template <typename T, bool kAdd, typename Kind, typename Sums>
DML_INLINE void range_shared_weights(const Kind& kind, const T* s, int64_t begin, int64_t end, int i,
                                     const WeightLines<T>& row, const WeightLines<T>& col,
                                     const SharedExponential<T>& shared, T* out, const Sums& sums) {
    alignas(64) T terms[kMostSide], coefficient[Sums::kLearns ? kMostSide : 1];
    range_terms(kind, s, begin, end, terms);
    const T bound = row.bound[i], offset = shared.offset, factor = shared.rows[i];
    const T* factors = shared.cols;
    if constexpr (Sums::kLearns) {
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) {
            T total = kind.kept(s[j], bound) ? factor : T(0);
            total += kind.kept(s[j], col.bound[j]) ? factors[j] : T(0);
            coefficient[j] = total != T(0) ? total * exp_fast(terms[j] - offset) : T(0);
        }
        sums.template add<kAdd>(kind, s, coefficient, begin, end, out, SameContext<T>{T(0)});
        return;
    }
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
        T total = kind.kept(s[j], bound) ? factor : T(0);
        total += kind.kept(s[j], col.bound[j]) ? factors[j] : T(0);
        // No 0 * inf where s is -inf.
        const T w = total != T(0) ? total * exp_fast(terms[j] - offset) * kind.derivative(s[j], T(0)) : T(0);
        out[j] = kAdd ? out[j] + w : w;
    }
}

// Log-sum-exps, an exponential for each side.
template <typename T, bool kBothSides, bool kAdd, typename Kind, typename Sums>
DML_INLINE void range_lse_weights(const Kind& kind, const T* s, int64_t begin, int64_t end, int i,
                                  const WeightLines<T>& row, const WeightLines<T>& col, T* out,
                                  const Sums& sums) {
    alignas(64) T terms[kMostSide], coefficient[Sums::kLearns ? kMostSide : 1];
    range_terms(kind, s, begin, end, terms);
    const T bound = row.bound[i], d = row.d[i], value = row.value[i];
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
        const T row_term = d * exp_fast(terms[j] - value);
        T total = kind.kept(s[j], bound) ? row_term : T(0);
        if constexpr (kBothSides) {
            const T col_term = col.d[j] * exp_fast(terms[j] - col.value[j]);
            total += kind.kept(s[j], col.bound[j]) ? col_term : T(0);
        }
        if constexpr (Sums::kLearns) {
            coefficient[j] = total;
        } else {
            const T w = total != T(0) ? total * kind.derivative(s[j], T(0)) : T(0);
            out[j] = kAdd ? out[j] + w : w;
        }
    }
    if constexpr (Sums::kLearns)
        sums.template add<kAdd>(kind, s, coefficient, begin, end, out, SameContext<T>{T(0)});
}

template <typename T, Accumulator kAccumulator, bool kBothSides, bool kAdd, typename Kind, typename Sums>
DML_INLINE void range_weights(const Kind& kind, const T* s, int64_t begin, int64_t end, int i,
                              const WeightLines<T>& row, const WeightLines<T>& col,
                              const SharedExponential<T>& shared, T* out, const Sums& sums) {
    if constexpr (kAccumulator == Accumulator::kSum) {
        range_sum_weights<T, kBothSides, kAdd>(kind, s, begin, end, i, row, col, out, sums);
    } else if (kBothSides && shared.valid) {
        range_shared_weights<T, kAdd>(kind, s, begin, end, i, row, col, shared, out, sums);
    } else {
        range_lse_weights<T, kBothSides, kAdd>(kind, s, begin, end, i, row, col, out, sums);
    }
}

// ---- a row, a tile ----------------------------------------------------------------------------------------

// Both sides of a tile for one kind of pair, and what they share.
template <typename T, Accumulator kAccumulator, bool kBothSides>
struct KindWeights {
    static constexpr bool kShares = kBothSides && kAccumulator == Accumulator::kLogSumExp;

    WeightLines<T> rows, cols;
    SharedExponential<T> shared;

    DML_INLINE KindWeights(const Tile<T>& tile, const WeightLines<T>& all)
        : rows(from(all, tile.row0)),
          cols(from(all, tile.col_line0)),
          shared(rows, kShares ? tile.rows : 0, cols, kShares ? tile.cols : 0) {}

   private:
    static DML_INLINE WeightLines<T> from(const WeightLines<T>& all, int64_t first) {
        return {all.bound + first, all.value + first, all.d + first, all.context + first};
    }
};

// ds = -d|x - y|: turns weights by distance into weights by the product <x, y>.
template <typename T>
DML_INLINE void divide_by_distance(const T* s, int cols, T* weights) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) weights[j] = s[j] < T(0) ? weights[j] / -s[j] : T(0);
}

template <typename T>
DML_INLINE int count_nonzeros(const T* x, int n) {
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < n; ++j) count += x[j] != T(0) ? 1 : 0;
    return count;
}

template <typename T, typename Formula, bool kBothSides, typename Sums>
int64_t weights_of(const Tile<T>& tile, const Formula& formula, bool euclidean, const RowWeights<T>& w,
                   T* out, const Sums& sums) {
    const Negatives<T, Formula> neg{formula};
    const Positives<T, Formula> pos{formula};
    const JoiningPositives<T, Formula> join{{formula}};
    const JoiningNegatives<T, Formula> join_pos{{formula}};
    const KindWeights<T, Formula::kNeg, kBothSides> of_neg(tile,
                                                           {w.neg_above, w.neg_value, w.d_neg, w.neg_value});
    const T* pos_bounds = Formula::kOnlyNegatives ? w.neg_above : w.pos_below;
    const KindWeights<T, Formula::kPos, kBothSides> of_pos(tile,
                                                           {pos_bounds, w.pos_value, w.d_pos, w.neg_value});
    WeightLines<T> join_rows = of_neg.rows, join_cols = of_neg.cols;  // but for the bounds
    join_rows.bound = of_pos.rows.bound;
    join_cols.bound = of_pos.cols.bound;
    int64_t count = 0;
    for (int i = 0; i < tile.rows; ++i) {
        T* line = out + static_cast<int64_t>(i) * tile.pitch;
        // 1. Negatives, in both accumulators or in one: writes the whole row, 0 for positives and the self pair.
        neg.for_each_range(tile, i, [&](const T* s, int64_t begin, int64_t end) DML_INLINE_LAMBDA {
            range_weights<T, Formula::kNeg, kBothSides, false>(neg, s, begin, end, i, of_neg.rows,
                                                               of_neg.cols, of_neg.shared, line, sums);
            if constexpr (Formula::kOnlyNegatives) {
                range_weights<T, Formula::kPos, kBothSides, true>(join_pos, s, begin, end, i, of_pos.rows,
                                                                  of_pos.cols, of_pos.shared, line, sums);
            }
        });
        // 2. Positives, and their share as members of the negatives' accumulator.
        if constexpr (!Formula::kOnlyNegatives)
            pos.for_each_range(tile, i, [&](const T* s, int64_t begin, int64_t end) DML_INLINE_LAMBDA {
                range_weights<T, Formula::kPos, kBothSides, false>(pos, s, begin, end, i, of_pos.rows,
                                                                   of_pos.cols, of_pos.shared, line, sums);
                if constexpr (Formula::kPosInNeg) {
                    range_weights<T, Formula::kNeg, kBothSides, true>(join, s, begin, end, i, join_rows,
                                                                      join_cols, of_neg.shared, line, sums);
                }
            });
        if (euclidean) divide_by_distance(tile.s + static_cast<int64_t>(i) * tile.pitch, tile.cols, line);
        count += count_nonzeros(line, tile.cols);
    }
    return count;
}

template <typename T, typename Formula>
int64_t weights(const Tile<T>& tile, const double* params, bool euclidean, const RowWeights<T>& rows, T* out,
                double* by_params) {
    const Formula formula(params);
    if (by_params) {
        const ParamSums<T, Formula> sums(params, by_params);
        return tile.both_sides ? weights_of<T, Formula, true>(tile, formula, euclidean, rows, out, sums)
                               : weights_of<T, Formula, false>(tile, formula, euclidean, rows, out, sums);
    }
    return tile.both_sides
               ? weights_of<T, Formula, true>(tile, formula, euclidean, rows, out, NoParamSums{})
               : weights_of<T, Formula, false>(tile, formula, euclidean, rows, out, NoParamSums{});
}

}  // namespace dml::cpu::DML_ISA
