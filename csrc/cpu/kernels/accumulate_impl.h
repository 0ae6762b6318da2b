// What a tile adds to the accumulators of its rows and columns, and the merge of what tiles left.

namespace dml::cpu::DML_ISA {

// The first step of mining: the smallest positive similarity of each line.
template <typename T>
void min_positives(const Tile<T>& tile, TileParts<T>& parts) {
    T *rows = parts.rows.pos_a, *cols = parts.cols.pos_a;
    for (int64_t j = 0; j < tile.cols; ++j) cols[j] = infinity<T>();
    for (int i = 0; i < tile.rows; ++i) {
        const T* s = tile.s + static_cast<int64_t>(i) * tile.pitch;
        const PositiveRun run = positive_run(tile, i);
        T row_min = infinity<T>();
        for (const auto& range : run.parts) {
            for (int64_t j = range[0]; j < range[1]; ++j) {
                row_min = s[j] < row_min ? s[j] : row_min;
                cols[j] = s[j] < cols[j] ? s[j] : cols[j];
            }
        }
        rows[i] = row_min;
    }
}

template <typename T>
DML_INLINE Lines<T> negative_lines(const RowStates<T>& states, int64_t first, LineParts<T>& parts) {
    return {states.neg_above + first, nullptr, parts.neg_a, parts.neg_b, parts.max_neg};
}
template <typename T, typename Formula>
DML_INLINE Lines<T> positive_lines(const RowStates<T>& states, int64_t first, LineParts<T>& parts) {
    return {states.pos_below + first, Formula::kContext ? states.neg_value + first : nullptr, parts.pos_a,
            parts.pos_b, parts.pos_context};
}

// Into the positives' accumulator (kOnlyNegatives).
template <typename T>
DML_INLINE Lines<T> joining_negative_lines(const RowStates<T>& states, int64_t first, LineParts<T>& parts) {
    return {states.neg_above + first, nullptr, parts.pos_a, parts.pos_b, parts.pos_context};
}

template <typename T, Accumulator kAccumulator, bool kBothSides, typename Kind>
DML_INLINE Found accumulate_kind(const Tile<T>& tile, const Kind& kind, bool count_nonzero,
                                 const Lines<T>& rows, const Lines<T>& cols) {
    if constexpr (kAccumulator == Accumulator::kLogSumExp) {
        return accumulate_lse<T, Kind, kBothSides>(tile, kind, rows, cols);
    } else {
        return accumulate_sum<T, Kind, kBothSides>(tile, kind, count_nonzero, rows, cols);
    }
}

// The parts of joining positives into those of the negatives (with_negatives), or in their place.
template <typename T>
DML_INLINE void join_negatives(const Lines<T>& joining, bool with_negatives, LineParts<T>& parts, int n) {
    for (int64_t i = 0; i < n; ++i) {
        LogSumExp<T> sum;
        if (with_negatives) sum = {parts.neg_a[i], parts.neg_b[i]};
        sum.merge(joining.a[i], joining.b[i]);
        parts.neg_a[i] = sum.max;
        parts.neg_b[i] = sum.sum;
    }
}

template <typename T, typename Formula, bool kBothSides>
Found accumulate_kinds(const Tile<T>& tile, const Formula& formula, Kinds kinds, bool count_nonzero,
                       const RowStates<T>& states, TileParts<T>& parts) {
    const bool negatives = kinds != Kinds::kPositives, positives = kinds != Kinds::kNegatives;
    Found found = {false, false};

    // 1. Negatives.
    if (negatives) {
        const Lines<T> rows = negative_lines(states, tile.row0, parts.rows),
                       cols = negative_lines(states, tile.col_line0, parts.cols);
        found |= accumulate_kind<T, Formula::kNeg, kBothSides>(tile, Negatives<T, Formula>{formula},
                                                               count_nonzero, rows, cols);
        if constexpr (Formula::kNeg == Accumulator::kSum) {
            if (!positives) {  // with mining
                hardest_negatives<T, kBothSides>(tile, rows, cols);
                found.parts = true;  // a tile of satisfied hinges has a hardest negative too
            }
        }
    }
    if constexpr (Formula::kOnlyNegatives) {
        if (negatives)
            found |= accumulate_sum<T, JoiningNegatives<T, Formula>, kBothSides>(
                tile, {{formula}}, count_nonzero, joining_negative_lines(states, tile.row0, parts.rows),
                joining_negative_lines(states, tile.col_line0, parts.cols));
        return found;
    }
    if (!positives) return found;

    // 2. Positives.
    found |= accumulate_kind<T, Formula::kPos, kBothSides>(
        tile, Positives<T, Formula>{formula}, count_nonzero,
        positive_lines<T, Formula>(states, tile.row0, parts.rows),
        positive_lines<T, Formula>(states, tile.col_line0, parts.cols));

    // 3. Positives as members of the negatives' accumulator.
    if constexpr (Formula::kPosInNeg) {
        LineParts<T> row_parts, col_parts;
        const Lines<T> rows = positive_lines<T, Formula>(states, tile.row0, row_parts),
                       cols = positive_lines<T, Formula>(states, tile.col_line0, col_parts);
        accumulate_lse<T, JoiningPositives<T, Formula>, kBothSides>(tile, {{formula}}, rows, cols);
        join_negatives(rows, negatives, parts.rows, tile.rows);
        if (kBothSides) join_negatives(cols, negatives, parts.cols, tile.cols);
    }
    return found;
}

template <typename T, typename Formula>
Found accumulate(const Tile<T>& tile, const double* params, Kinds kinds, bool count_nonzero,
                 const RowStates<T>& states, TileParts<T>& parts) {
    const Formula formula(params);
    return tile.both_sides
               ? accumulate_kinds<T, Formula, true>(tile, formula, kinds, count_nonzero, states, parts)
               : accumulate_kinds<T, Formula, false>(tile, formula, kinds, count_nonzero, states, parts);
}

template <typename T>
void merge(Accumulator accumulator, int n, const T* part_a, const T* part_b, T* a, T* b) {
    if (accumulator == Accumulator::kSum) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            a[i] += part_a[i];
            b[i] += part_b[i];
        }
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {  // as LogSumExp::merge
        const T max = part_a[i] > a[i] ? part_a[i] : a[i];
        const T offset = max == -infinity<T>() ? T(0) : max;
        b[i] = b[i] * exp_fast(a[i] - offset) + part_b[i] * exp_fast(part_a[i] - offset);
        a[i] = max;
    }
}

}  // namespace dml::cpu::DML_ISA
