// The bodies of tile_kernels.h. No include guard and no includes of its own beyond that header: each
// kernels_<set>.cpp includes this file once, after telling the compiler its instruction set,
// with DML_ISA naming the namespace, so that no two sets ever share a function, and DML_VECTOR_BYTES
// the width of its registers.

namespace dml::cpu::DML_ISA {

// The columns of one row of a tile that hold its positives: a run, in two parts where the self pair
// cuts it.
struct PositiveRun {
    int parts[2][2];
    int begin() const { return parts[0][0]; }
    int end() const { return parts[1][1]; }
};

template <typename T>
DML_INLINE PositiveRun positive_run(const Tile<T>& tile, int i) {
    const int64_t row = tile.row0 + i;
    const int64_t first = tile.pos_begin[row] - tile.col0, last = tile.pos_end[row] - tile.col0;
    const int begin = static_cast<int>(first < 0 ? 0 : first > tile.cols ? tile.cols : first);
    const int end = static_cast<int>(last < 0 ? 0 : last > tile.cols ? tile.cols : last);
    const int64_t self = tile.own ? tile.own[row] - tile.col0 : -1;
    if (self >= begin && self < end) {
        const int at = static_cast<int>(self);
        return {{{begin, at}, {at + 1, end}}};
    }
    return {{{begin, end}, {end, end}}};
}

// The similarities of row i with -inf in place of its positives, which no bound keeps: so the loops
// over negatives run over whole rows, without a ragged start or end. Copies only where there are any.
template <typename T>
DML_INLINE const T* negatives_of_row(const Tile<T>& tile, int i, T* buffer) {
    const T* s = tile.s + static_cast<int64_t>(i) * tile.pitch;
    const PositiveRun run = positive_run(tile, i);
    if (run.begin() == run.end()) return s;
    for (int64_t j = 0; j < tile.cols; ++j) buffer[j] = s[j];
    for (int64_t j = run.begin(); j < run.end(); ++j) buffer[j] = -infinity<T>();
    return buffer;
}

// |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y> loses the digits that |x|^2 + |y|^2 has more of: points nearer than
// this share of it are subtracted.
template <typename T>
inline constexpr T kNearShare = T(1) / T(64);

template <typename T>
void distances(T* s, int64_t pitch, int rows, int cols, const T* x, int64_t x_stride, const T* x_square,
               const T* y, int64_t y_stride, const T* y_square, int64_t dim) {
    for (int i = 0; i < rows; ++i) {
        T* line = s + i * pitch;
        const T own = x_square[i];
        int near = 0;
#pragma omp simd reduction(+ : near)
        for (int64_t j = 0; j < cols; ++j) {
            const T both = own + y_square[j], square = both - T(2) * line[j];
            near += square < kNearShare<T> * both ? 1 : 0;
            line[j] = square;
        }
        if (near > 0) {
            for (int64_t j = 0; j < cols; ++j) {
                if (!(line[j] < kNearShare<T> * (own + y_square[j]))) continue;
                const T *a = x + i * x_stride, *b = y + j * y_stride;
                T square = 0;
#pragma omp simd reduction(+ : square)
                for (int64_t d = 0; d < dim; ++d) square += (a[d] - b[d]) * (a[d] - b[d]);
                line[j] = square;
            }
        }
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) line[j] = -std::sqrt(line[j] > T(0) ? line[j] : T(0));
    }
}

template <typename T>
void min_positives(const Tile<T>& tile, TileParts<T>& parts) {
    T *rows = parts.rows.pos_a, *cols = parts.cols.pos_a;
    for (int64_t j = 0; j < tile.cols; ++j) cols[j] = infinity<T>();
    for (int i = 0; i < tile.rows; ++i) {
        const T* s = tile.s + static_cast<int64_t>(i) * tile.pitch;
        const PositiveRun run = positive_run(tile, i);
        T least = infinity<T>();
        for (const auto& range : run.parts) {
            for (int64_t j = range[0]; j < range[1]; ++j) {
                least = s[j] < least ? s[j] : least;
                cols[j] = s[j] < cols[j] ? s[j] : cols[j];
            }
        }
        rows[i] = least;
    }
}

// One kind of pair, as the loops below see it. for_each_range calls visit(s, begin, end) for the stretches
// of row i that hold pairs of the kind.
template <typename T, typename Formula>
struct Negatives {
    static constexpr bool kContext = false, kHinge = Formula::kHinge;
    Formula formula;
    template <typename Visit>
    static DML_INLINE void for_each_range(const Tile<T>& tile, int i, const Visit& visit) {
        alignas(64) T buffer[kMostSide];
        visit(negatives_of_row(tile, i, buffer), 0, tile.cols);
    }
    DML_INLINE bool kept(T s, T bound) const { return s > bound; }
    DML_INLINE T term(T s, T) const { return formula.neg_term(s); }
    DML_INLINE T derivative(T s, T) const { return formula.neg_derivative(s); }
    DML_INLINE T context(T, T) const { return T(0); }
};
template <typename T, typename Formula>
struct Positives {
    static constexpr bool kContext = Formula::kContext, kHinge = Formula::kHinge;
    Formula formula;
    template <typename Visit>
    static DML_INLINE void for_each_range(const Tile<T>& tile, int i, const Visit& visit) {
        const PositiveRun run = positive_run(tile, i);
        const T* s = tile.s + static_cast<int64_t>(i) * tile.pitch;
        for (const auto& range : run.parts) {
            if (range[0] < range[1]) visit(s, range[0], range[1]);
        }
    }
    DML_INLINE bool kept(T s, T bound) const { return s < bound; }
    DML_INLINE T term(T s, T ctx) const { return formula.pos_term(s, ctx); }
    DML_INLINE T derivative(T s, T ctx) const { return formula.pos_derivative(s, ctx); }
    DML_INLINE T context(T s, T ctx) const {
        if constexpr (kContext) return formula.pos_context(s, ctx);
        return T(0);
    }
};
// The positives as they join the negatives' accumulator.
template <typename T, typename Formula>
struct JoiningPositives : Positives<T, Formula> {
    static constexpr bool kContext = false;
    DML_INLINE T term(T s, T) const { return this->formula.neg_term(s); }
    DML_INLINE T derivative(T s, T) const { return this->formula.neg_derivative(s); }
};

// The terms of a range of a row. In a loop and an array of their own, so that they are rounded before
// anything is subtracted from them (see rounded_product).
template <typename T, typename Kind>
DML_INLINE void range_terms(const Kind& kind, const T* s, int64_t begin, int64_t end, T* term) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) term[j] = kind.term(s[j], T(0));
}

// One side of a tile, as an accumulation sees it.
template <typename T>
struct Lines {
    const T* bound;    // [lines]
    const T* context;  // [lines], null where the terms see none
    T *a, *b;          // results: max and sum, or count and sum
    T* extra;          // results: the hardest kept similarity, or the sum of contexts
};

// ---- log-sum-exps -----------------------------------------------------------------------------------------

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
// serves all lines, and so one exponential both sides.
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

// The largest and the least of the lines' finite numbers.
template <typename T>
struct Spread {
    T most = -infinity<T>(), least = infinity<T>();
    DML_INLINE void add(const T* x, int n) {
        for (int64_t i = 0; i < n; ++i) {
            if (x[i] == -infinity<T>()) continue;
            most = x[i] > most ? x[i] : most;
            least = x[i] < least ? x[i] : least;
        }
    }
    DML_INLINE bool empty() const { return most == -infinity<T>(); }
    // Whether one offset serves all: exponentials relative to the largest lose nothing of the least.
    DML_INLINE bool narrow() const { return most - least < (sizeof(T) == 8 ? T(300) : T(40)); }
};

// Two sweeps over the tile, which fits in cache: maxima first, so that no exponential can overflow,
// then sums. Where mining has left nothing the second sweep does not run.
template <typename T, typename Kind, bool kBothSides>
Found accumulate_lse(const Tile<T>& tile, const Kind& kind, const Lines<T>& rows, const Lines<T>& cols) {
    const auto clear = [](const Lines<T>& lines, int n) {
        for (int64_t i = 0; i < n; ++i) {
            lines.a[i] = lines.extra[i] = -infinity<T>();
            lines.b[i] = T(0);
        }
    };
    clear(rows, tile.rows);
    if (kBothSides) clear(cols, tile.cols);
    for (int i = 0; i < tile.rows; ++i) {
        Kind::for_each_range(tile, i, [&](const T* s, int64_t begin, int64_t end) {
            range_maxima<T, Kind, kBothSides>(kind, s, begin, end, rows.bound[i], rows.a[i], rows.extra[i],
                                              cols);
        });
    }
    Spread<T> spread, of_cols;
    spread.add(rows.a, tile.rows);
    if (kBothSides) of_cols.add(cols.a, tile.cols);
    const bool any_col = !of_cols.empty();
    if (spread.empty() && !any_col) return {false, false};
    if (any_col) {
        spread.most = of_cols.most > spread.most ? of_cols.most : spread.most;
        spread.least = of_cols.least < spread.least ? of_cols.least : spread.least;
    }
    const bool shared = any_col && spread.narrow();
    for (int i = 0; i < tile.rows; ++i) {
        if (rows.a[i] == -infinity<T>() && !any_col) continue;
        Kind::for_each_range(tile, i, [&](const T* s, int64_t begin, int64_t end) {
            const T bound = rows.bound[i];
            if (shared) {
                range_sums<T, Kind, true, true>(kind, s, begin, end, bound, spread.most, rows.b[i], cols);
            } else if (any_col) {
                range_sums<T, Kind, true, false>(kind, s, begin, end, bound, rows.a[i], rows.b[i], cols);
            } else {
                range_sums<T, Kind, false, false>(kind, s, begin, end, bound, rows.a[i], rows.b[i], cols);
            }
        });
    }
    if (shared) {
        const auto set = [&](const Lines<T>& lines, int n) {
            for (int64_t i = 0; i < n; ++i) {
                if (lines.a[i] != -infinity<T>()) lines.a[i] = spread.most;
            }
        };
        set(rows, tile.rows);
        set(cols, tile.cols);
    }
    return {true, true};
}

// ---- sums -------------------------------------------------------------------------------------------------

template <typename T, typename Kind, bool kBothSides>
Found accumulate_sum(const Tile<T>& tile, const Kind& kind, bool count_nonzero, const Lines<T>& rows,
                     const Lines<T>& cols) {
    constexpr bool kContext = Kind::kContext;
    if (kBothSides) {
        for (int64_t j = 0; j < tile.cols; ++j) cols.a[j] = cols.b[j] = cols.extra[j] = T(0);
    }
    const T zero_counts = count_nonzero ? T(0) : T(1);  // what a kept pair whose term is 0 counts
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
                c += kept ? (term != T(0) ? T(1) : zero_counts) : T(0);
                if constexpr (kContext) x += kept ? kind.context(s[j], context) : T(0);
                if constexpr (kBothSides) {
                    const T ctx = kContext ? col_context[j] : T(0);
                    const T col_term = kContext ? kind.term(s[j], ctx) : term;
                    const bool kept_col = kind.kept(s[j], col_bound[j]);
                    col_sum[j] += kept_col ? col_term : T(0);
                    col_count[j] += kept_col ? (col_term != T(0) ? T(1) : zero_counts) : T(0);
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
    const auto some = [&](const T* of_rows, const T* of_cols) {
        bool any = false;
        for (int i = 0; i < tile.rows; ++i) any |= of_rows[i] != T(0);
        for (int64_t j = 0; kBothSides && j < tile.cols; ++j) any |= of_cols[j] != T(0);
        return any;
    };
    const bool terms = some(rows.b, cols.b), counts = some(rows.a, cols.a);
    return {terms || counts, terms || (counts && !Kind::kHinge)};
}

// The hardest kept negative of each line, which mining wants; a log-sum-exp finds it on its way.
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
        T most = -infinity<T>();
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < tile.cols; ++j) {
            const T kept = s[j] > bound ? s[j] : -infinity<T>();
            most = kept > most ? kept : most;
            if constexpr (kBothSides) {
                const T kept_col = s[j] > col_bound[j] ? s[j] : -infinity<T>();
                col_max[j] = kept_col > col_max[j] ? kept_col : col_max[j];
            }
        }
        rows.extra[i] = most;
    }
}

template <typename T, typename Formula, bool kBothSides>
Found accumulate_kinds(const Tile<T>& tile, const Formula& formula, Kinds kinds, bool count_nonzero,
                       const RowStates<T>& states, TileParts<T>& parts) {
    const int wanted = static_cast<int>(kinds);
    Found found = {false, false};
    const auto lines = [&](LineParts<T>& of, int64_t first, bool positives) {
        return positives ? Lines<T>{states.pos_below + first,
                                    Formula::kContext ? states.neg_value + first : nullptr, of.pos_a,
                                    of.pos_b, of.pos_context}
                         : Lines<T>{states.neg_above + first, nullptr, of.neg_a, of.neg_b, of.max_neg};
    };
    const auto run = [&](const auto& kind, auto accumulator, const Lines<T>& rows, const Lines<T>& cols) {
        using Kind = std::decay_t<decltype(kind)>;
        Found here;
        if constexpr (decltype(accumulator)::value == Accumulator::kLogSumExp) {
            here = accumulate_lse<T, Kind, kBothSides>(tile, kind, rows, cols);
        } else {
            here = accumulate_sum<T, Kind, kBothSides>(tile, kind, count_nonzero, rows, cols);
        }
        found = {found.parts || here.parts, found.gradient || here.gradient};
    };
    if (wanted & static_cast<int>(Kinds::kNegatives)) {
        const Lines<T> rows = lines(parts.rows, tile.row0, false), cols = lines(parts.cols, tile.col0, false);
        run(Negatives<T, Formula>{formula}, std::integral_constant<Accumulator, Formula::kNeg>(), rows, cols);
        if constexpr (Formula::kNeg == Accumulator::kSum) {  // the hardest negative, for mining
            if (wanted == static_cast<int>(Kinds::kNegatives)) {
                hardest_negatives<T, kBothSides>(tile, rows, cols);
                found.parts = true;  // satisfied hinges too have a hardest negative
            }
        }
    }
    if (wanted & static_cast<int>(Kinds::kPositives)) {
        run(Positives<T, Formula>{formula}, std::integral_constant<Accumulator, Formula::kPos>(),
            lines(parts.rows, tile.row0, true), lines(parts.cols, tile.col0, true));
    }
    if constexpr (Formula::kPosInNeg) {
        if (wanted & static_cast<int>(Kinds::kPositives)) {
            LineParts<T> row_parts, col_parts;
            Lines<T> rows = lines(row_parts, tile.row0, true), cols = lines(col_parts, tile.col0, true);
            accumulate_lse<T, JoiningPositives<T, Formula>, kBothSides>(tile, {{formula}}, rows, cols);
            const auto join = [&](const Lines<T>& from, LineParts<T>& to, int n) {
                for (int64_t i = 0; i < n; ++i) {
                    LogSumExp<T> sum;
                    if (wanted & static_cast<int>(Kinds::kNegatives)) sum = {to.neg_a[i], to.neg_b[i]};
                    sum.merge(from.a[i], from.b[i]);
                    to.neg_a[i] = sum.max;
                    to.neg_b[i] = sum.sum;
                }
            };
            join(rows, parts.rows, tile.rows);
            if (kBothSides) join(cols, parts.cols, tile.cols);
        }
    }
    return found;
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
        const T most = part_a[i] > a[i] ? part_a[i] : a[i];
        const T offset = most == -infinity<T>() ? T(0) : most;
        b[i] = b[i] * exp_fast(a[i] - offset) + part_b[i] * exp_fast(part_a[i] - offset);
        a[i] = most;
    }
}

template <typename T, typename Formula>
Found accumulate(const Tile<T>& tile, const double* params, Kinds kinds, bool count_nonzero,
                 const RowStates<T>& states, TileParts<T>& parts) {
    const Formula formula(params);
    return tile.both_sides
               ? accumulate_kinds<T, Formula, true>(tile, formula, kinds, count_nonzero, states, parts)
               : accumulate_kinds<T, Formula, false>(tile, formula, kinds, count_nonzero, states, parts);
}

// ---- weights ----------------------------------------------------------------------------------------------

// One side of a tile, as the weights of one kind of pair see it.
template <typename T>
struct Weighed {
    const T *bound, *value, *d, *context;  // [lines]
};

// For a log-sum-exp: d exp(term - value), for both sides with one exponential where the values of all lines
// are near enough, as exp(term - offset) (d exp(offset - value)).
template <typename T>
struct SharedExponential {
    alignas(64) T rows[kMostSide], cols[kMostSide];  // d exp(offset - value)
    T offset;
    bool holds;

    DML_INLINE SharedExponential(const Weighed<T>& row, int n, const Weighed<T>& col, int m) {
        Spread<T> spread;
        spread.add(row.value, n);
        spread.add(col.value, m);
        offset = spread.most;
        holds = !spread.empty() && spread.narrow();
        if (!holds) return;
        fill(rows, row, n);
        fill(cols, col, m);
    }
    DML_INLINE void fill(T* factor, const Weighed<T>& of, int n) const {
        for (int64_t i = 0; i < n; ++i) {
            const bool empty = of.value[i] == -infinity<T>();
            factor[i] = empty ? T(0) : of.d[i] * exp_fast(offset - of.value[i]);
        }
    }
};

// Writes (or adds) the weights of the kind's pairs in a range of row i.
template <typename T, Accumulator kAccumulator, bool kBothSides, bool kAdd, typename Kind>
DML_INLINE void range_weights(const Kind& kind, const T* s, int64_t begin, int64_t end, int i,
                              const Weighed<T>& row, const Weighed<T>& col,
                              const SharedExponential<T>* shared, T* out) {
    const T bound = row.bound[i], d = row.d[i];
    if constexpr (kAccumulator == Accumulator::kSum) {
        const T context = Kind::kContext ? row.context[i] : T(0);
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) {
            const T of_row = kind.kept(s[j], bound) ? d : T(0);
            T total = T(0);
            if constexpr (Kind::kContext) {
                total = of_row != T(0) ? of_row * kind.derivative(s[j], context) : T(0);
                if constexpr (kBothSides) {
                    const T of_col = kind.kept(s[j], col.bound[j]) ? col.d[j] : T(0);
                    total += of_col != T(0) ? of_col * kind.derivative(s[j], col.context[j]) : T(0);
                }
            } else {
                total = of_row;
                if constexpr (kBothSides) total += kind.kept(s[j], col.bound[j]) ? col.d[j] : T(0);
                total = total != T(0) ? total * kind.derivative(s[j], T(0)) : T(0);
            }
            out[j] = kAdd ? out[j] + total : total;
        }
        return;
    }
    alignas(64) T terms[kMostSide];
    range_terms(kind, s, begin, end, terms);
    if (kBothSides && shared->holds) {
        const T offset = shared->offset, factor = shared->rows[i];
        const T* factors = shared->cols;
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) {
            T total = kind.kept(s[j], bound) ? factor : T(0);
            total += kind.kept(s[j], col.bound[j]) ? factors[j] : T(0);
            // No 0 * inf where s is -inf.
            const T w =
                total != T(0) ? total * exp_fast(terms[j] - offset) * kind.derivative(s[j], T(0)) : T(0);
            out[j] = kAdd ? out[j] + w : w;
        }
        return;
    }
    const T value = row.value[i];
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
        const T row_term = d * exp_fast(terms[j] - value);
        T total = kind.kept(s[j], bound) ? row_term : T(0);
        if constexpr (kBothSides) {
            const T col_term = col.d[j] * exp_fast(terms[j] - col.value[j]);
            total += kind.kept(s[j], col.bound[j]) ? col_term : T(0);
        }
        const T w = total != T(0) ? total * kind.derivative(s[j], T(0)) : T(0);
        out[j] = kAdd ? out[j] + w : w;
    }
}

template <typename T, typename Formula, bool kBothSides>
int64_t weights_of(const Tile<T>& tile, const Formula& formula, bool euclidean, const RowWeights<T>& w,
                   T* out) {
    const int64_t r = tile.row0, c = tile.col0;
    const auto negatives = [&](int64_t at) {
        return Weighed<T>{w.neg_above + at, w.neg_value + at, w.d_neg + at, nullptr};
    };
    const auto positives = [&](int64_t at) {
        return Weighed<T>{w.pos_below + at, w.pos_value + at, w.d_pos + at, w.neg_value + at};
    };
    const auto joining = [&](int64_t at) {
        return Weighed<T>{w.pos_below + at, w.neg_value + at, w.d_neg + at, nullptr};
    };
    const Weighed<T> neg_rows = negatives(r), neg_cols = negatives(c), pos_rows = positives(r),
                     pos_cols = positives(c), join_rows = joining(r), join_cols = joining(c);
    const Negatives<T, Formula> neg{formula};
    const Positives<T, Formula> pos{formula};
    const JoiningPositives<T, Formula> join{{formula}};
    const int n = kBothSides ? tile.rows : 0, m = kBothSides ? tile.cols : 0;
    const SharedExponential<T> shared_neg(neg_rows, Formula::kNeg == Accumulator::kSum ? 0 : n, neg_cols,
                                          Formula::kNeg == Accumulator::kSum ? 0 : m);
    const SharedExponential<T> shared_pos(pos_rows, Formula::kPos == Accumulator::kSum ? 0 : n, pos_cols,
                                          Formula::kPos == Accumulator::kSum ? 0 : m);
    int64_t count = 0;
    for (int i = 0; i < tile.rows; ++i) {
        T* line = out + static_cast<int64_t>(i) * tile.pitch;
        neg.for_each_range(tile, i,
                           [&](const T* s, int64_t begin, int64_t end) {  // writes 0 for positives and self
                               range_weights<T, Formula::kNeg, kBothSides, false>(
                                   neg, s, begin, end, i, neg_rows, neg_cols, &shared_neg, line);
                           });
        pos.for_each_range(tile, i, [&](const T* s, int64_t begin, int64_t end) {
            range_weights<T, Formula::kPos, kBothSides, false>(pos, s, begin, end, i, pos_rows, pos_cols,
                                                               &shared_pos, line);
            if constexpr (Formula::kPosInNeg) {
                range_weights<T, Formula::kNeg, kBothSides, true>(join, s, begin, end, i, join_rows,
                                                                  join_cols, &shared_neg, line);
            }
        });
        if (euclidean) {  // ds = -d|x - y|; the weights are those of the product <x, y>
            const T* s = tile.s + static_cast<int64_t>(i) * tile.pitch;
#pragma omp simd
            for (int64_t j = 0; j < tile.cols; ++j) line[j] = s[j] < T(0) ? line[j] / -s[j] : T(0);
        }
        int nonzeros = 0;
#pragma omp simd reduction(+ : nonzeros)
        for (int64_t j = 0; j < tile.cols; ++j) nonzeros += line[j] != T(0) ? 1 : 0;
        count += nonzeros;
    }
    return count;
}

template <typename T, typename Formula>
int64_t weights(const Tile<T>& tile, const double* params, bool euclidean, const RowWeights<T>& rows,
                T* out) {
    const Formula formula(params);
    return tile.both_sides ? weights_of<T, Formula, true>(tile, formula, euclidean, rows, out)
                           : weights_of<T, Formula, false>(tile, formula, euclidean, rows, out);
}

template <typename T, typename Formula>
RowDerivatives<T> row(const double* params, const Gathered<T>& gathered, T pos_context) {
    return Formula(params).row(gathered, pos_context);
}

template <typename T, typename Formula>
void terms(const double* params, bool positives, int64_t n, const T* s, const T* context, T* term,
           T* derivative, T* by_context) {
    const Formula formula(params);
    if (positives) {
        for (int64_t k = 0; k < n; ++k) {
            term[k] = formula.pos_term(s[k], context[k]);
            derivative[k] = formula.pos_derivative(s[k], context[k]);
            by_context[k] = formula.pos_context(s[k], context[k]);
        }
        return;
    }
    for (int64_t k = 0; k < n; ++k) {
        term[k] = formula.neg_term(s[k]);
        derivative[k] = formula.neg_derivative(s[k]);
        by_context[k] = T(0);
    }
}

template <typename T>
void compress(const T* weights, int64_t pitch, int rows, int cols, int64_t count, void* memory) {
    // The same places as SparseTile's, for writing.
    T* value = static_cast<T*>(memory);
    auto* start = reinterpret_cast<uint16_t*>(value + 2 * count);
    auto* index = reinterpret_cast<uint8_t*>(start + rows + cols + 2);
    T* col_value = value + count;
    uint16_t* col_start = start + rows + 1;
    uint8_t* col_index = index + count;
    int n = 0;
    for (int i = 0; i < rows; ++i) {
        start[i] = static_cast<uint16_t>(n);
        const T* w = weights + i * pitch;
        for (int64_t j = 0; j < cols; ++j) {  // no branch: always write, advance only past a non-zero
            index[n] = static_cast<uint8_t>(j);
            value[n] = w[j];
            n += w[j] != T(0);
        }
    }
    start[rows] = static_cast<uint16_t>(n);
    int column_count[kMostSide] = {};
    for (int k = 0; k < n; ++k) ++column_count[index[k]];
    int next[kMostSide];
    int total = 0;
    for (int64_t j = 0; j < cols; ++j) {
        col_start[j] = static_cast<uint16_t>(total);
        next[j] = total;
        total += column_count[j];
    }
    col_start[cols] = static_cast<uint16_t>(total);
    for (int i = 0; i < rows; ++i) {
        for (int k = start[i]; k < start[i + 1]; ++k) {
            const int at = next[index[k]]++;
            col_index[at] = static_cast<uint8_t>(i);
            col_value[at] = value[k];
        }
    }
}

// As wide as a register of the instruction set.
template <typename T>
using Vector __attribute__((vector_size(DML_VECTOR_BYTES), aligned(sizeof(T)), may_alias)) = T;

template <typename T, int kVectors>
DML_INLINE void add_product_strip(const typename SparseTile<T>::Lines& sparse, int lines, const T* x,
                                  int64_t x_stride, T* out, int64_t out_stride) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T);
    using V = Vector<T>;
    for (int i = 0; i < lines; ++i) {
        const int begin = sparse.start[i], end = sparse.start[i + 1];
        if (begin == end) continue;
        V* line = reinterpret_cast<V*>(out + i * out_stride);
        V sum[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[v] = line[v];
        for (int k = begin; k < end; ++k) {
            const T value = sparse.value[k];
            const T* source = x + sparse.index[k] * x_stride;
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
                sum[v] += value * *reinterpret_cast<const V*>(source + v * kLanes);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) line[v] = sum[v];
    }
}

// A strip of columns at a time, so that the strip of x stays in the first-level cache.
template <typename T>
void add_product(const typename SparseTile<T>::Lines& sparse, int lines, const T* x, int64_t x_stride,
                 int64_t dim, T* out, int64_t out_stride) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T);
    constexpr int kWide = DML_VECTOR_BYTES == 64 ? 4 : 8;
    int64_t at = 0;
    for (; at + kWide * kLanes <= dim; at += kWide * kLanes) {
        add_product_strip<T, kWide>(sparse, lines, x + at, x_stride, out + at, out_stride);
    }
    for (; at + kLanes <= dim; at += kLanes) {
        add_product_strip<T, 1>(sparse, lines, x + at, x_stride, out + at, out_stride);
    }
    if (at == dim) return;
    for (int i = 0; i < lines; ++i) {
        for (int k = sparse.start[i]; k < sparse.start[i + 1]; ++k) {
            const T* source = x + sparse.index[k] * x_stride;
            for (int64_t d = at; d < dim; ++d) out[i * out_stride + d] += sparse.value[k] * source[d];
        }
    }
}

template <typename T, typename Formula>
TileKernels<T> make_kernels() {
    return {distances<T>,        min_positives<T>,   accumulate<T, Formula>, merge<T>,
            weights<T, Formula>, row<T, Formula>,    terms<T, Formula>,      compress<T>,
            add_product<T>,      Formula::kNeg,      Formula::kPos,          Formula::kPlusOne,
            Formula::kContext,   Formula::kPosInNeg, Formula::kHinge,        Formula::kNeedsPos,
            Formula::kNeedsNeg,  Formula::kCount,    Formula::kParts};
}

template <typename T>
const TileKernels<T>& kernels(FormulaId formula) {
    static const TileKernels<T> tables[] = {
#define DML_TABLE(name, Struct) make_kernels<T, WithDerivatives<T, Struct<T>>>(),
        DML_FORMULAS(DML_TABLE)
#undef DML_TABLE
    };
    return tables[static_cast<int>(formula)];
}

template const TileKernels<float>& kernels<float>(FormulaId);
template const TileKernels<double>& kernels<double>(FormulaId);

}  // namespace dml::cpu::DML_ISA
