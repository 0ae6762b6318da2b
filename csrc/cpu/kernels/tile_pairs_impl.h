// Which pairs a tile holds: the run of positives of a row, its negatives, and one struct for each kind of
// pair, which the loops over pairs take as a template argument.

namespace dml::cpu::DML_ISA {

// The columns of a row that hold its positives: one run, in two parts where the self pair cuts it.
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
    const int64_t self = tile.self_col ? tile.self_col[row] - tile.col0 : -1;
    if (self >= begin && self < end) {
        const int at = static_cast<int>(self);
        return {{{begin, at}, {at + 1, end}}};
    }
    return {{{begin, end}, {end, end}}};
}

// The similarities of row i with -inf in place of its positives and the self pair. No bound keeps -inf, so
// loops over negatives run over the whole row without a mask. Copies only a row that has positives here.
template <typename T>
DML_INLINE const T* negatives_of_row(const Tile<T>& tile, int i, T* buffer) {
    const T* s = tile.s + static_cast<int64_t>(i) * tile.pitch;
    const PositiveRun run = positive_run(tile, i);
    if (run.begin() == run.end()) return s;
    for (int64_t j = 0; j < tile.cols; ++j) buffer[j] = s[j];
    for (int64_t j = run.begin(); j < run.end(); ++j) buffer[j] = -infinity<T>();
    return buffer;
}

// A kind of pair: where its pairs lie, which of them a bound keeps, and their terms.
// for_each_range calls visit(s, begin, end) for each range of row i that holds pairs of the kind.
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
    template <typename All>
    DML_INLINE auto derivatives(const All& all, T s, T) const {
        return all.neg_term(s);
    }
    DML_INLINE bool is_nonzero(T term) const { return Formula::is_nonzero(term); }
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
    template <typename All>
    DML_INLINE auto derivatives(const All& all, T s, T ctx) const {
        return all.pos_term(s, ctx);
    }
    DML_INLINE bool is_nonzero(T term) const { return Formula::is_nonzero(term); }
};

// Positives as members of the negatives' accumulator (kPosInNeg).
template <typename T, typename Formula>
struct JoiningPositives : Positives<T, Formula> {
    static constexpr bool kContext = false;
    DML_INLINE T term(T s, T) const { return this->formula.neg_term(s); }
    DML_INLINE T derivative(T s, T) const { return this->formula.neg_derivative(s); }
    template <typename All>
    DML_INLINE auto derivatives(const All& all, T s, T) const {
        return all.neg_term(s);
    }
};

// Negatives as members of the positives' accumulator (kOnlyNegatives).
template <typename T, typename Formula>
struct JoiningNegatives : Negatives<T, Formula> {
    DML_INLINE T term(T s, T) const { return this->formula.pos_term(s, T(0)); }
    DML_INLINE T derivative(T s, T) const { return this->formula.pos_derivative(s, T(0)); }
    template <typename All>
    DML_INLINE auto derivatives(const All& all, T s, T) const {
        return all.pos_term(s, T(0));
    }
};

// The terms of a range of a row. A separate loop into an array rounds them before anything is subtracted
// (see rounded_product).
template <typename T, typename Kind>
DML_INLINE void range_terms(const Kind& kind, const T* s, int64_t begin, int64_t end, T* term) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) term[j] = kind.term(s[j], T(0));
}

// The rows or the columns of a tile, as the accumulation of one kind of pair sees them.
template <typename T>
struct Lines {
    const T* bound;    // [lines]
    const T* context;  // [lines], null where the terms see none
    T *a, *b;          // [lines] results: max and sum, or count and sum
    T* extra;          // [lines] results: the hardest kept similarity, or the sum of context derivatives
};

}  // namespace dml::cpu::DML_ISA
