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
    const T* s = tile.s + static_cast<int64_t>(i) * tile.cols;
    const PositiveRun run = positive_run(tile, i);
    if (run.begin() == run.end()) return s;
    for (int j = 0; j < tile.cols; ++j) buffer[j] = s[j];
    for (int j = run.begin(); j < run.end(); ++j) buffer[j] = -infinity<T>();
    return buffer;
}

template <typename T>
void min_positives(const Tile<T>& tile, T* min_pos) {
    for (int i = 0; i < tile.rows; ++i) {
        const T* s = tile.s + static_cast<int64_t>(i) * tile.cols;
        const PositiveRun run = positive_run(tile, i);
        T least = min_pos[tile.row0 + i];
        for (const auto& range : run.parts) {
            for (int j = range[0]; j < range[1]; ++j) least = s[j] < least ? s[j] : least;
            if (tile.both_sides) {
                T* columns = min_pos + tile.col0;
                for (int j = range[0]; j < range[1]; ++j) columns[j] = s[j] < columns[j] ? s[j] : columns[j];
            }
        }
        min_pos[tile.row0 + i] = least;
    }
}

// One kind of pair, as the loops below see it. for_each_range calls visit(s, begin, end) for the stretches
// of row i that hold pairs of the kind.
template <typename T, typename Loss>
struct Negatives {
    Loss loss;
    template <typename Visit>
    static DML_INLINE void for_each_range(const Tile<T>& tile, int i, const Visit& visit) {
        alignas(64) T buffer[kTile];
        visit(negatives_of_row(tile, i, buffer), 0, tile.cols);
    }
    static DML_INLINE T bound(const Bounds<T>& b) { return b.neg_above; }
    DML_INLINE bool kept(T s, T bound) const { return s > bound; }
    DML_INLINE T logit(T s) const { return loss.logit_neg(s); }
    DML_INLINE T slope(T s) const { return loss.slope_neg(s); }
};
template <typename T, typename Loss>
struct Positives {
    Loss loss;
    template <typename Visit>
    static DML_INLINE void for_each_range(const Tile<T>& tile, int i, const Visit& visit) {
        const PositiveRun run = positive_run(tile, i);
        const T* s = tile.s + static_cast<int64_t>(i) * tile.cols;
        for (const auto& range : run.parts) {
            if (range[0] < range[1]) visit(s, range[0], range[1]);
        }
    }
    static DML_INLINE T bound(const Bounds<T>& b) { return b.pos_below; }
    DML_INLINE bool kept(T s, T bound) const { return s < bound; }
    DML_INLINE T logit(T s) const { return loss.logit_pos(s); }
    DML_INLINE T slope(T s) const { return loss.slope_pos(s); }
};

// The logits of a range of a row. In a loop and an array of their own, so that they are rounded before
// anything is subtracted from them (see rounded_product).
template <typename T, typename Kind>
DML_INLINE void range_logits(const Kind& kind, const T* s, int begin, int end, T* logit) {
#pragma omp simd
    for (int j = begin; j < end; ++j) logit[j] = kind.logit(s[j]);
}

template <typename T>
struct TileStats {  // of one side of a tile: its rows or its columns
    alignas(64) T bound[kTile];
    alignas(64) T max_logit[kTile];
    alignas(64) T max_s[kTile];
    alignas(64) T sum[kTile];
};

template <typename T, typename Kind>
DML_INLINE void begin_stats(TileStats<T>& stats, const RowState<T>* state, int n) {
    for (int i = 0; i < n; ++i) {
        stats.bound[i] = Kind::bound(state[i].bounds);
        stats.max_logit[i] = stats.max_s[i] = -infinity<T>();
        stats.sum[i] = T(0);
    }
}

// Largest logit and similarity kept, for row i and for the columns of the range.
template <typename T, typename Kind, bool kBothSides>
DML_INLINE void range_maxima(const Kind& kind, const T* s, int begin, int end, T bound, T& max_logit,
                             T& max_s, TileStats<T>& cols) {
    alignas(64) T logits[kTile];
    range_logits(kind, s, begin, end, logits);
    T row_logit = max_logit, row_s = max_s;
#pragma omp simd reduction(max : row_logit, row_s)
    for (int j = begin; j < end; ++j) {
        const T logit = logits[j];
        const bool kept = kind.kept(s[j], bound);
        const T kept_logit = kept ? logit : -infinity<T>();
        const T kept_s = kept ? s[j] : -infinity<T>();
        row_logit = kept_logit > row_logit ? kept_logit : row_logit;
        row_s = kept_s > row_s ? kept_s : row_s;
        if constexpr (kBothSides) {
            const bool kept_col = kind.kept(s[j], cols.bound[j]);
            const T col_logit = kept_col ? logit : -infinity<T>();
            const T col_s = kept_col ? s[j] : -infinity<T>();
            cols.max_logit[j] = col_logit > cols.max_logit[j] ? col_logit : cols.max_logit[j];
            cols.max_s[j] = col_s > cols.max_s[j] ? col_s : cols.max_s[j];
        }
    }
    max_logit = row_logit;
    max_s = row_s;
}

// sum of exp(logit - max) over the kept pairs, for row i and for the columns of the range.
template <typename T, typename Kind, bool kBothSides>
DML_INLINE void range_sums(const Kind& kind, const T* s, int begin, int end, T bound, T max_logit, T& sum,
                           TileStats<T>& cols) {
    alignas(64) T logits[kTile];
    range_logits(kind, s, begin, end, logits);
    T row_sum = sum;
#pragma omp simd reduction(+ : row_sum)
    for (int j = begin; j < end; ++j) {
        const T logit = logits[j];
        const T term = exp_fast(logit - max_logit);
        row_sum += kind.kept(s[j], bound) ? term : T(0);
        if constexpr (kBothSides) {
            const T col_term = exp_fast(logit - cols.max_logit[j]);
            cols.sum[j] += kind.kept(s[j], cols.bound[j]) ? col_term : T(0);
        }
    }
    sum = row_sum;
}

template <typename T>
DML_INLINE bool merge_stats(const TileStats<T>& stats, RowState<T>* state, int n,
                            LogSumExp<T> RowState<T>::* lse, bool track_max) {
    bool any = false;
    for (int i = 0; i < n; ++i) {
        if (stats.max_logit[i] == -infinity<T>()) continue;
        any = true;
        (state[i].*lse).merge(stats.max_logit[i], stats.sum[i]);
        if (track_max && stats.max_s[i] > state[i].max_neg) state[i].max_neg = stats.max_s[i];
    }
    return any;
}

// Two sweeps over the tile, which fits in cache: maxima first, so that no exponential can overflow,
// then sums. Where mining has left nothing the second sweep does not run.
template <typename T, typename Kind, bool kBothSides>
bool accumulate_kind(const Tile<T>& tile, const Kind& kind, LogSumExp<T> RowState<T>::* lse, bool track_max,
                     RowState<T>* state) {
    TileStats<T> rows, cols;
    begin_stats<T, Kind>(rows, state + tile.row0, tile.rows);
    if (kBothSides) begin_stats<T, Kind>(cols, state + tile.col0, tile.cols);
    for (int i = 0; i < tile.rows; ++i) {
        Kind::for_each_range(tile, i, [&](const T* s, int begin, int end) {
            range_maxima<T, Kind, kBothSides>(kind, s, begin, end, rows.bound[i], rows.max_logit[i],
                                              rows.max_s[i], cols);
        });
    }
    bool any_col = false;
    if (kBothSides) {
        for (int j = 0; j < tile.cols; ++j) any_col |= cols.max_logit[j] != -infinity<T>();
    }
    for (int i = 0; i < tile.rows; ++i) {
        const bool any_row = rows.max_logit[i] != -infinity<T>();
        if (!any_row && !any_col) continue;
        Kind::for_each_range(tile, i, [&](const T* s, int begin, int end) {
            if (any_col) {
                range_sums<T, Kind, kBothSides>(kind, s, begin, end, rows.bound[i], rows.max_logit[i],
                                                rows.sum[i], cols);
            } else {
                range_sums<T, Kind, false>(kind, s, begin, end, rows.bound[i], rows.max_logit[i], rows.sum[i],
                                           cols);
            }
        });
    }
    bool any = merge_stats(rows, state + tile.row0, tile.rows, lse, track_max);
    if (kBothSides) any |= merge_stats(cols, state + tile.col0, tile.cols, lse, track_max);
    return any;
}

template <typename T, typename Loss>
bool accumulate(const Tile<T>& tile, const double* params, Kinds kinds, RowState<T>* state) {
    const Loss loss(params);
    const int wanted = static_cast<int>(kinds);
    bool any = false;
    const auto run = [&](const auto& kind, auto lse, bool track_max) {
        using Kind = std::decay_t<decltype(kind)>;
        any |= tile.both_sides ? accumulate_kind<T, Kind, true>(tile, kind, lse, track_max, state)
                               : accumulate_kind<T, Kind, false>(tile, kind, lse, track_max, state);
    };
    if (wanted & static_cast<int>(Kinds::kNegatives)) run(Negatives<T, Loss>{loss}, &RowState<T>::neg, true);
    if (wanted & static_cast<int>(Kinds::kPositives)) run(Positives<T, Loss>{loss}, &RowState<T>::pos, false);
    return any;
}

template <typename T, typename Kind, bool kBothSides>
DML_INLINE int range_weights(const Kind& kind, const T* s, int begin, int end, T bound, T lse, T weight,
                             const T* col_bound, const T* col_lse, const T* col_weight, T* out) {
    alignas(64) T logits[kTile];
    range_logits(kind, s, begin, end, logits);
    int count = 0;
#pragma omp simd reduction(+ : count)
    for (int j = begin; j < end; ++j) {
        const T logit = logits[j];
        const T row_term = weight * exp_fast(logit - lse);
        T total = kind.kept(s[j], bound) ? row_term : T(0);
        if constexpr (kBothSides) {
            const T col_term = col_weight[j] * exp_fast(logit - col_lse[j]);
            total += kind.kept(s[j], col_bound[j]) ? col_term : T(0);
        }
        out[j] = total != T(0) ? total * kind.slope(s[j]) : T(0);  // no 0 * inf where s is -inf
        count += out[j] != T(0) ? 1 : 0;
    }
    return count;
}

template <typename T, typename Loss, bool kBothSides>
int64_t weights_of(const Tile<T>& tile, const Loss& loss, const RowWeights<T>& rows, T* out) {
    const Negatives<T, Loss> neg{loss};
    const Positives<T, Loss> pos{loss};
    int64_t count = 0;
    for (int i = 0; i < tile.rows; ++i) {
        const int64_t r = tile.row0 + i, c = tile.col0;
        T* w = out + static_cast<int64_t>(i) * tile.cols;
        neg.for_each_range(tile, i, [&](const T* s, int begin, int end) {  // writes 0 for positives and self
            count += range_weights<T, Negatives<T, Loss>, kBothSides>(
                neg, s, begin, end, rows.neg_above[r], rows.lse_neg[r], rows.weight_neg[r],
                rows.neg_above + c, rows.lse_neg + c, rows.weight_neg + c, w);
        });
        pos.for_each_range(tile, i, [&](const T* s, int begin, int end) {
            count += range_weights<T, Positives<T, Loss>, kBothSides>(
                pos, s, begin, end, rows.pos_below[r], rows.lse_pos[r], rows.weight_pos[r],
                rows.pos_below + c, rows.lse_pos + c, rows.weight_pos + c, w);
        });
    }
    return count;
}

template <typename T, typename Loss>
int64_t weights(const Tile<T>& tile, const double* params, const RowWeights<T>& rows, T* out) {
    const Loss loss(params);
    return tile.both_sides ? weights_of<T, Loss, true>(tile, loss, rows, out)
                           : weights_of<T, Loss, false>(tile, loss, rows, out);
}

template <typename T, typename Loss>
T row_loss(const double* params, T lse_pos, T lse_neg) {
    return Loss(params).loss(lse_pos, lse_neg);
}

template <typename T, typename Loss>
PosNeg<T> row_derivatives(const double* params, T lse_pos, T lse_neg) {
    return Loss(params).dloss_dlse(lse_pos, lse_neg);
}

template <typename T>
void compress(const T* weights, int rows, int cols, SparseTile<T>& by_row, SparseTile<T>& by_col) {
    int n = 0;
    for (int i = 0; i < rows; ++i) {
        by_row.start[i] = n;
        const T* w = weights + static_cast<int64_t>(i) * cols;
        for (int j = 0; j < cols; ++j) {  // no branch: always write, advance only past a non-zero
            by_row.index[n] = static_cast<uint8_t>(j);
            by_row.value[n] = w[j];
            n += w[j] != T(0);
        }
    }
    by_row.start[rows] = n;
    int column_count[kTile] = {};
    for (int k = 0; k < n; ++k) ++column_count[by_row.index[k]];
    int next[kTile];
    int total = 0;
    for (int j = 0; j < cols; ++j) {
        by_col.start[j] = next[j] = total;
        total += column_count[j];
    }
    by_col.start[cols] = total;
    for (int i = 0; i < rows; ++i) {
        for (int k = by_row.start[i]; k < by_row.start[i + 1]; ++k) {
            const int at = next[by_row.index[k]]++;
            by_col.index[at] = static_cast<uint8_t>(i);
            by_col.value[at] = by_row.value[k];
        }
    }
}

// As wide as a register of the instruction set.
template <typename T>
using Vector __attribute__((vector_size(DML_VECTOR_BYTES), aligned(sizeof(T)), may_alias)) = T;

template <typename T, int kVectors>
DML_INLINE void add_product_strip(const SparseTile<T>& sparse, int lines, const T* x, int64_t x_stride,
                                  T* out, int64_t out_stride) {
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
void add_product(const SparseTile<T>& sparse, int lines, const T* x, int64_t x_stride, int64_t dim, T* out,
                 int64_t out_stride) {
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

template <typename T, typename Loss>
TileKernels<T> make_kernels() {
    return {min_positives<T>,  accumulate<T, Loss>,      weights<T, Loss>,
            row_loss<T, Loss>, row_derivatives<T, Loss>, compress<T>,
            add_product<T>,    Loss::kCountsOne,         Loss::kNeedsBoth};
}

template <typename T>
const TileKernels<T>& kernels(PairLoss loss) {
    static const TileKernels<T> multi_similarity = make_kernels<T, MultiSimilarity<T>>();
    static const TileKernels<T> circle = make_kernels<T, Circle<T>>();
    return loss == PairLoss::kMultiSimilarity ? multi_similarity : circle;
}

template const TileKernels<float>& kernels<float>(PairLoss);
template const TileKernels<double>& kernels<double>(PairLoss);

}  // namespace dml::cpu::DML_ISA
