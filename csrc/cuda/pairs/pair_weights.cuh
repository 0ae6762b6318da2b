// Large batches, backward, first half: the similarities of a tile become weights, in a bounded workspace.
//
// W'_ij = dL/ds_ij / (|q_i| |r_j|), both factors at once, because a tile serves its rows (W' R) and its
// columns (W'^T Q); times a power of two that keeps it in range where rows are very long. Distances of rows
// that are not normalised have no such factors, but need the sums of W' along rows and columns as well:
// G_i = sum_j W'_ij (r_j - q_i).
//
// As in forward an exponential is relative to one number of the tile, and serves both lines: here the largest
// log-sum-exp of its lines. Where log-sum-exps lie so far apart that digits would be lost, the whole tile
// computes an exponential for each line.
#pragma once

#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/row_weights.cuh"
#include "cuda/pairs/tile_pairs.cuh"

namespace dml::cuda {

// The type that weights are stored in: what a product in GradMath would round them to anyway.
template <typename GradMath>
struct WeightOf {
    using Type = typename GradMath::Acc;
};
template <typename T>
struct WeightOf<HalfMath<T>> {
    using Type = T;
};
template <typename T>
struct WeightOf<Tf32Math<T, false>> {
    using Type = RoundedToTf32;
};

// How far apart the log-sum-exps of a tile's lines may lie.
template <typename Acc>
inline constexpr Acc kWidestValues = Acc(sizeof(Acc) == 4 ? 40 : 500);

// The largest log-sum-exp of the lines that count; careful is set where the least lies too far below.
template <typename Math, typename Acc>
DML_DEVICE Acc common_value(bool counts, Acc value, Acc* shared, bool& careful) {
    counts = counts && is_finite(value);
    const Acc top = block_max<Math>(counts ? value : -infinity<Acc>(), shared);
    const Acc least = -block_max<Math>(counts ? -value : -infinity<Acc>(), shared + kWarpSize);
    careful = careful || top - least > kWidestValues<Acc>;
    return top;
}

// Shared numbers of each line.
enum LineNumber { kPosBound, kNegBound, kPosWeight, kNegWeight, kLineValue };

// ---- dL/ds of a tile's pairs -----------------------------------------------------------------------------

template <typename Math, typename Formula, typename T, typename Acc = typename Math::Acc>
struct TileWeights {
    using Grid = PairGrid<Math>;
    using Sims = typename Grid::Sims;
    static constexpr int kTile = Grid::kTile, kLines = Grid::kLines;
    static constexpr bool kNegExp = Formula::kNeg == Accumulator::kLogSumExp,
                          kPosExp = Formula::kPos == Accumulator::kLogSumExp;

    const TileGroup<T, Acc>& tile_group;
    const LoadedTile<Math>& tile;
    const Formula& formula;
    const RowStats<Acc>& row_stats;
    const Upstream<Acc>& upstream;
    Acc top_neg = 0, top_pos = 0;  // what exponentials are relative to
    bool careful = false;          // each line has its own exponentials

    // 1. Bounds and factors of each line, by one thread a line.
    DML_DEVICE void load_lines(int64_t ti, int64_t tj) {
        Acc* numbers = Grid::line_numbers();
        const int line = int(threadIdx.x);
        const int64_t row = line_of_thread<Math>(tile_group, ti, tj);
        RowWeight<Acc> weight;
        if (row >= 0 && (tile_group.square || line < kTile))
            weight = RowWeight<Acc>::load(row_stats, row, upstream);
        Acc* scratch = Grid::scratch(1);
        if constexpr (kNegExp)
            top_neg = common_value<Math>(weight.d_neg != Acc(0), weight.neg, scratch, careful);
        if constexpr (kPosExp)
            top_pos =
                common_value<Math>(weight.d_pos != Acc(0), weight.pos, scratch + 2 * kWarpSize, careful);
        if (line < kLines) {
            const auto factor = [&](bool exponential, Acc d, Acc value, Acc top) {
                if (!exponential || careful || d == Acc(0)) return d;
                return d * std::exp(top - value);
            };
            // A line without derivative keeps nothing: its exponentials, relative to other lines' values, may
            // overflow.
            const bool neg = weight.d_neg != Acc(0) || (Formula::kOnlyNegatives && weight.d_pos != Acc(0)),
                       pos = weight.d_pos != Acc(0) || (Formula::kPosInNeg && neg);
            numbers[kPosBound * kLines + line] = pos ? weight.bounds.pos_below : -infinity<Acc>();
            numbers[kNegBound * kLines + line] = neg ? weight.bounds.neg_above : infinity<Acc>();
            numbers[kNegWeight * kLines + line] = factor(kNegExp, weight.d_neg, weight.neg, top_neg);
            numbers[kPosWeight * kLines + line] = factor(kPosExp, weight.d_pos, weight.pos, top_pos);
            if constexpr (Formula::kContext) numbers[kLineValue * kLines + line] = weight.neg;
        }
        block_sync();
    }

    // What negatives need of the thread's columns, in registers; a rare positive reads the rest from shared
    // memory. Where not square, nothing is kept by a column.
    struct Columns {
        ColumnIds<Grid> ids;
        Acc pos_bound[Grid::kCols], neg_bound[Grid::kCols], neg_weight[Grid::kCols];

        DML_DEVICE Columns() {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                if constexpr (Formula::kPosInNeg) pos_bound[j] = col_number(kPosBound, j);
                neg_bound[j] = col_number(kNegBound, j);
                neg_weight[j] = col_number(kNegWeight, j);
            }
        }
    };
    static DML_DEVICE Acc col_number(LineNumber number, int j) {
        return Grid::line_numbers()[number * kLines + kTile + Grid::col(j)];
    }

    // 2. The weights of this thread's pairs in row i. kBoth: pairs may be kept by their columns, too.
    template <bool kBoth>
    DML_DEVICE Sims weigh_row(int i, const Sims& sims, const Columns& cols) const {
        const Acc* numbers = Grid::line_numbers();
        const int at = Grid::row(i), id = Grid::ids()[at];
        const Acc pos_bound = numbers[kPosBound * kLines + at], neg_bound = numbers[kNegBound * kLines + at];
        const Acc neg = numbers[kNegWeight * kLines + at], pos = numbers[kPosWeight * kLines + at];
        const Acc context = Formula::kContext ? numbers[kLineValue * kLines + at] : Acc(0);
        Sims w;
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j) {  // members of the negatives' accumulator
            const Acc s = sims.s[j];
            const bool positive = cols.ids.positive(j, id);
            const auto kept = [&](Acc pos_below, Acc neg_above) {
                if constexpr (Formula::kPosInNeg) return positive ? s < pos_below : s > neg_above;
                return !positive && s > neg_above;
            };
            const bool by_row = kept(pos_bound, neg_bound);
            const bool by_col = kBoth && kept(cols.pos_bound[j], cols.neg_bound[j]);
            Acc derivative = formula.neg_derivative(s);
            if constexpr (kNegExp) derivative *= quick_exp(formula.neg_term(s) - top_neg);
            Acc sum = by_row ? neg : Acc(0);
            if (by_col) sum += cols.neg_weight[j];
            w.s[j] = by_row || by_col ? sum * derivative : Acc(0);
        }
        if (Formula::kOnlyNegatives || cols.ids.any_positive(id)) {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                const Acc s = sims.s[j];
                const bool positive = cols.ids.positive(j, id);
                const auto kept = [&](Acc pos_below, Acc neg_above) {
                    return Formula::kOnlyNegatives ? !positive && s > neg_above : positive && s < pos_below;
                };
                const bool by_row = kept(pos_bound, neg_bound);
                const bool by_col = kBoth && kept(col_number(kPosBound, j), cols.neg_bound[j]);
                Acc sum;
                if constexpr (Formula::kContext) {
                    sum = by_row ? pos * formula.pos_derivative(s, context) : Acc(0);
                    if (by_col)
                        sum +=
                            col_number(kPosWeight, j) * formula.pos_derivative(s, col_number(kLineValue, j));
                } else {
                    Acc derivative = formula.pos_derivative(s, Acc(0));
                    if constexpr (kPosExp) derivative *= quick_exp(formula.pos_term(s, Acc(0)) - top_pos);
                    sum = ((by_row ? pos : Acc(0)) + (by_col ? col_number(kPosWeight, j) : Acc(0))) *
                          derivative;
                }
                if (by_row || by_col) w.s[j] += sum;
            }
        }
        return w;
    }

    // The same without a number in common, from each line's own log-sum-exps.
    DML_DEVICE Sims weigh_row_carefully(int i) const {
        const int row = Grid::row(i);
        const auto load = [&](int64_t at, int64_t rows) {
            return at < rows ? RowWeight<Acc>::load(row_stats, at, upstream) : RowWeight<Acc>{};
        };
        const RowWeight<Acc> row_weight = load(tile.row0 + row, tile_group.rows.points.rows);
#pragma unroll 1
        for (int j = 0; j < Grid::kCols; ++j) {
            const int col = Grid::col(j);
            const bool positive = Grid::ids()[row] == Grid::ids()[kTile + col];
            const Acc s = Grid::sim(row, col);
            RowWeight<Acc> line_weight = row_weight;
            Acc sum = 0;
#pragma unroll 1
            for (int side = 0; side < (tile_group.square ? 2 : 1); ++side) {
                if (side == 1) line_weight = load(tile.col0 + col, tile_group.cols.points.rows);
                sum += line_weight.of(formula, positive, s);
            }
            Grid::sim(row, col) = sum;
        }
        return Grid::sims(i);
    }

    // 3. Calls write(i, similarities, weights) for each row i of this thread's pairs. kOneLoop: where not square,
    // too, by the loop in which columns may keep pairs.
    template <bool kOneLoop = false, typename Write>
    DML_DEVICE void for_rows(const Write& write) const {
        const Columns cols;
#pragma unroll 1
        for (int i = 0; i < Grid::kRows; ++i) {
            const Sims sims = Grid::sims(i);
            Sims w;
            if (careful) {
                w = weigh_row_carefully(i);
            } else if (kOneLoop || tile_group.square) {
                w = weigh_row<true>(i, sims, cols);
            } else {
                w = weigh_row<false>(i, sims, cols);
            }
            write(i, sims, w);
        }
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------

// weights: [row_tiles, col_tiles, kTile, kTile] of the tile group. sums: of each line's weights, written
// where distances of rows that are not normalised need them.
template <typename Math, typename Weight, typename T = typename Math::Value,
          typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kPairBlocks<Math>)
    pair_weights(const __grid_constant__ TileGroup<T, Acc> all,
                 const __grid_constant__ AnyFormula<Acc> any_formula, RowStats<Acc> row_stats,
                 Upstream<Acc> upstream, const uint8_t* kept, Weight* weights, Partials<Acc> sums) {
    let_next_kernel_start();
    using Traits = TileTraits<Math>;
    using Grid = PairGrid<Math>;
    constexpr int kTile = Traits::kTile;
    const auto tile_group = all.template in_use<kTile>();
    const int row_tile = int(blockIdx.y), col_tile = int(blockIdx.x);
    const int64_t ti = tile_group.row_tile + row_tile, tj = tile_group.col_tile + col_tile;
    if (!tile_group.has(ti, tj) || (kept && !(kept[tile_group.tile_index(ti, tj)] & kHasGradient))) return;
    const LoadedTile<Math> tile = load_pairs<Math>(tile_group, ti, tj, false);
    const Acc* norms = shared_array<Acc>(Traits::kNorms, 2 * kTile);
    Weight* out = weights + (int64_t(row_tile) * tile_group.col_tiles + col_tile) * kTile * kTile;
    const WarpExchange<Grid> exchange = {Grid::scratch(1)};
    const Similarity kind = tile_group.similarity;
    const bool unscaled = kind.euclidean && !kind.normalize;
    const Acc range = unscaled ? Acc(1) : row_stats.header[kRange];

    struct alignas(16) Row {
        Weight w[Grid::kCols];
    };
    Acc col_norms[Grid::kCols], col_sums[Grid::kCols] = {};
#pragma unroll
    for (int j = 0; j < Grid::kCols; ++j) col_norms[j] = unscaled ? Acc(1) : norms[kTile + Grid::col(j)];
    const auto write = [&](int i, const typename Grid::Sims& sims, const typename Grid::Sims& w) {
        const Acc row_norm = unscaled ? Acc(1) : norms[Grid::row(i)] * range;
        typename Grid::Sims x = w;
        if (kind.euclidean) {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) x.s[j] = by_distance(x.s[j], sims.s[j]);
        }
        Row row;
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j) x.s[j] = x.s[j] * row_norm * col_norms[j];
        if constexpr (sizeof(Weight) == 2) {
#pragma unroll
            for (int j = 0; j < Grid::kCols; j += 2) {
                const uint32_t both = pack2<Weight>(x.s[j], x.s[j + 1]);
                std::memcpy(&row.w[j], &both, sizeof both);
            }
        } else {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) row.w[j] = Weight(x.s[j]);
        }
        if (unscaled) {
            Acc row_sum = 0;
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                row_sum += Acc(row.w[j]);
                col_sums[j] += Acc(row.w[j]);
            }
            exchange.put_row(0, i, merge_lanes<Grid>(row_sum, Plus{}));
        }
        *reinterpret_cast<Row*>(out + Grid::row(i) * kTile + Grid::col(0)) = row;
    };
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        TileWeights<Math, Formula, T> tile_weights = {tile_group, tile, formula, row_stats, upstream};
        tile_weights.load_lines(ti, tj);
        tile_weights.for_rows(write);
    });
    if (!unscaled) return;
    exchange.put_cols(0, col_sums, Plus{});
    block_sync();
    const int line = int(threadIdx.x), side = line < kTile ? 0 : 1;
    if (line >= Grid::kLines) return;
    const int at = side == 0 ? row_tile * kTile + line : (col_tile - 1) * kTile + line;
    sums.template at<kTile>(tile_group, side, side == 0 ? col_tile : row_tile, 0, at) =
        exchange.get(0, line, Plus{});
}

}  // namespace dml::cuda
