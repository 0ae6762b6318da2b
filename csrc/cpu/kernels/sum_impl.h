// The accumulation of a kind of pair into sums of terms, and the hardest negative that goes with it.

namespace dml::cpu::DML_ISA {

template <typename T>
DML_INLINE bool any_nonzero(const T* x, int n) {
    bool any = false;
    for (int64_t i = 0; i < n; ++i) any |= x[i] != T(0);
    return any;
}

// count_nonzero: pairs whose term counts as 0 do not count.
template <typename T, typename Kind, bool kBothSides>
Found accumulate_sum(const Tile<T>& tile, const Kind& kind, bool count_nonzero, const Lines<T>& rows,
                     const Lines<T>& cols) {
    constexpr bool kContext = Kind::kContext;
    if (kBothSides) {
        for (int64_t j = 0; j < tile.cols; ++j) cols.a[j] = cols.b[j] = cols.extra[j] = T(0);
    }
    const T zero_counts = count_nonzero ? T(0) : T(1);  // what a kept pair with term 0 counts
    const T *col_bound = cols.bound, *col_context = cols.context;
    T *col_count = cols.a, *col_sum = cols.b, *col_extra = cols.extra;
    for (int i = 0; i < tile.rows; ++i) {
        T count = 0, sum = 0, extra = 0;
        const T bound = rows.bound[i], context = kContext ? rows.context[i] : T(0);
        Kind::for_each_range(tile, i, [&](const T* s, int64_t begin, int64_t end) {
            T c = count, t = sum, x = extra;
#pragma omp simd reduction(+ : c, t, x)
            for (int64_t j = begin; j < end; ++j) {
                const T term = kind.term(s[j], context);
                const bool kept = kind.kept(s[j], bound);
                t += kept ? term : T(0);
                c += kept ? (kind.is_nonzero(term) ? T(1) : zero_counts) : T(0);
                if constexpr (kContext) x += kept ? kind.context(s[j], context) : T(0);
                if constexpr (kBothSides) {
                    const T ctx = kContext ? col_context[j] : T(0);
                    const T col_term = kContext ? kind.term(s[j], ctx) : term;
                    const bool kept_col = kind.kept(s[j], col_bound[j]);
                    col_sum[j] += kept_col ? col_term : T(0);
                    col_count[j] += kept_col ? (kind.is_nonzero(col_term) ? T(1) : zero_counts) : T(0);
                    if constexpr (kContext) col_extra[j] += kept_col ? kind.context(s[j], ctx) : T(0);
                }
            }
            count = c;
            sum = t;
            extra = x;
        });
        rows.a[i] = count;
        rows.b[i] = sum;
        rows.extra[i] = extra;
    }
    const int cols_served = kBothSides ? tile.cols : 0;
    const bool terms = any_nonzero(rows.b, tile.rows) || any_nonzero(cols.b, cols_served);
    const bool counts = any_nonzero(rows.a, tile.rows) || any_nonzero(cols.a, cols_served);
    // A term of 0 may have a derivative, but not that of a hinge: backward skips tiles of satisfied hinges.
    return {terms || counts, terms || (counts && !Kind::kHinge)};
}

// The hardest kept negative of each line, into `extra`: what mining compares positives with. accumulate_lse
// finds it along with its maxima.
template <typename T, bool kBothSides>
DML_INLINE void hardest_negatives(const Tile<T>& tile, const Lines<T>& rows, const Lines<T>& cols) {
    if (kBothSides) {
        for (int64_t j = 0; j < tile.cols; ++j) cols.extra[j] = -infinity<T>();
    }
    const T* col_bound = cols.bound;
    T* col_max = cols.extra;
    for (int i = 0; i < tile.rows; ++i) {
        alignas(64) T buffer[kMostSide];
        const T* s = negatives_of_row(tile, i, buffer);
        const T bound = rows.bound[i];
        T row_max = -infinity<T>();
#pragma omp simd reduction(max : row_max)
        for (int64_t j = 0; j < tile.cols; ++j) {
            const T kept = s[j] > bound ? s[j] : -infinity<T>();
            row_max = kept > row_max ? kept : row_max;
            if constexpr (kBothSides) {
                const T kept_col = s[j] > col_bound[j] ? s[j] : -infinity<T>();
                col_max[j] = kept_col > col_max[j] ? kept_col : col_max[j];
            }
        }
        rows.extra[i] = row_max;
    }
}

}  // namespace dml::cpu::DML_ISA
