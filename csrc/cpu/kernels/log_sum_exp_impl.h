// The accumulation of a kind of pair into log-sum-exps: maxima first, then sums of exponentials.

namespace dml::cpu::DML_ISA {

// Largest term and similarity kept, for row i and for the columns of the range.
template <typename T, typename Kind, bool kBothSides>
DML_INLINE void range_maxima(const Kind& kind, const T* s, int64_t begin, int64_t end, T bound, T& max_term,
                             T& max_s, const Lines<T>& cols) {
    alignas(64) T terms[kMostSide];
    range_terms(kind, s, begin, end, terms);
    T row_term = max_term, row_s = max_s;
    const T* col_bound = cols.bound;
    T *col_max = cols.a, *col_max_s = cols.extra;
#pragma omp simd reduction(max : row_term, row_s)
    for (int64_t j = begin; j < end; ++j) {
        const T term = terms[j];
        const bool kept = kind.kept(s[j], bound);
        const T kept_term = kept ? term : -infinity<T>();
        const T kept_s = kept ? s[j] : -infinity<T>();
        row_term = kept_term > row_term ? kept_term : row_term;
        row_s = kept_s > row_s ? kept_s : row_s;
        if constexpr (kBothSides) {
            const bool kept_col = kind.kept(s[j], col_bound[j]);
            const T col_term = kept_col ? term : -infinity<T>();
            const T col_s = kept_col ? s[j] : -infinity<T>();
            col_max[j] = col_term > col_max[j] ? col_term : col_max[j];
            col_max_s[j] = col_s > col_max_s[j] ? col_s : col_max_s[j];
        }
    }
    max_term = row_term;
    max_s = row_s;
}

// sum of exp(term - max) over the kept pairs, for row i and for the columns of the range. kShared: one max
// serves all lines, so one exponential serves both sides.
template <typename T, typename Kind, bool kBothSides, bool kShared>
DML_INLINE void range_sums(const Kind& kind, const T* s, int64_t begin, int64_t end, T bound, T max_term,
                           T& sum, const Lines<T>& cols) {
    alignas(64) T terms[kMostSide];
    range_terms(kind, s, begin, end, terms);
    T row_sum = sum;
    const T *col_bound = cols.bound, *col_max = cols.a;
    T* col_sum = cols.b;
#pragma omp simd reduction(+ : row_sum)
    for (int64_t j = begin; j < end; ++j) {
        const T term = exp_fast(terms[j] - max_term);
        row_sum += kind.kept(s[j], bound) ? term : T(0);
        if constexpr (kBothSides) {
            const T col_term = kShared ? term : exp_fast(terms[j] - col_max[j]);
            col_sum[j] += kind.kept(s[j], col_bound[j]) ? col_term : T(0);
        }
    }
    sum = row_sum;
}

// The range of the lines' finite numbers.
template <typename T>
struct Spread {
    T largest = -infinity<T>(), smallest = infinity<T>();
    DML_INLINE void add(const T* x, int n) {
        for (int64_t i = 0; i < n; ++i) {
            if (x[i] == -infinity<T>()) continue;
            largest = x[i] > largest ? x[i] : largest;
            smallest = x[i] < smallest ? x[i] : smallest;
        }
    }
    DML_INLINE void add(const Spread& spread) {
        largest = spread.largest > largest ? spread.largest : largest;
        smallest = spread.smallest < smallest ? spread.smallest : smallest;
    }
    DML_INLINE bool empty() const { return largest == -infinity<T>(); }
    // Whether one offset serves all lines: exp(smallest - largest) keeps its precision.
    DML_INLINE bool narrow() const { return largest - smallest < (sizeof(T) == 8 ? T(300) : T(40)); }
};

template <typename T>
DML_INLINE void clear_lse(const Lines<T>& lines, int n) {
    for (int64_t i = 0; i < n; ++i) {
        lines.a[i] = lines.extra[i] = -infinity<T>();
        lines.b[i] = T(0);
    }
}

// The sums of lines with pairs are relative to one shared maximum.
template <typename T>
DML_INLINE void set_shared_max(const Lines<T>& lines, int n, T max) {
    for (int64_t i = 0; i < n; ++i) {
        if (lines.a[i] != -infinity<T>()) lines.a[i] = max;
    }
}

// Two passes over the tile, which fits in cache.
template <typename T, typename Kind, bool kBothSides>
Found accumulate_lse(const Tile<T>& tile, const Kind& kind, const Lines<T>& rows, const Lines<T>& cols) {
    clear_lse(rows, tile.rows);
    if (kBothSides) clear_lse(cols, tile.cols);

    // 1. Maxima, so that no exponential overflows.
    for (int i = 0; i < tile.rows; ++i) {
        Kind::for_each_range(tile, i, [&](const T* s, int64_t begin, int64_t end) {
            range_maxima<T, Kind, kBothSides>(kind, s, begin, end, rows.bound[i], rows.a[i], rows.extra[i],
                                              cols);
        });
    }
    Spread<T> spread, col_spread;
    spread.add(rows.a, tile.rows);
    if (kBothSides) col_spread.add(cols.a, tile.cols);
    const bool any_col = !col_spread.empty();
    if (spread.empty() && !any_col) return {false, false};  // mining kept nothing

    // 2. Sums: with one exponential for both sides where one maximum serves all lines.
    spread.add(col_spread);
    const bool shared = any_col && spread.narrow();
    for (int i = 0; i < tile.rows; ++i) {
        if (rows.a[i] == -infinity<T>() && !any_col) continue;
        Kind::for_each_range(tile, i, [&](const T* s, int64_t begin, int64_t end) {
            const T bound = rows.bound[i];
            if (shared) {
                range_sums<T, Kind, true, true>(kind, s, begin, end, bound, spread.largest, rows.b[i], cols);
            } else if (any_col) {
                range_sums<T, Kind, true, false>(kind, s, begin, end, bound, rows.a[i], rows.b[i], cols);
            } else {
                range_sums<T, Kind, false, false>(kind, s, begin, end, bound, rows.a[i], rows.b[i], cols);
            }
        });
    }
    if (shared) {
        set_shared_max(rows, tile.rows, spread.largest);
        set_shared_max(cols, tile.cols, spread.largest);
    }
    return {true, true};
}

}  // namespace dml::cpu::DML_ISA
