// Large batches, backward, first half: the similarities of a tile become weights, in a bounded workspace.
//
// W'_ij = dL/ds_ij / (|q_i| |r_j|), both factors at once, because a tile serves its rows (W' R) and its
// columns (W'^T Q); times a power of two that keeps it in range where rows are very long. Distances of rows
// as they come have no such factors, but take the sums of W' along rows and columns as well:
// G_i = sum_j W'_ij (r_j - q_i).
//
// As in forward an exponential is relative to one number of the tile, and serves both lines: here the largest
// value that a log-sum-exp of its lines has. Where some value lies so far below that digits would be lost,
// the whole tile takes an exponential for each line.
#pragma once

#include "cuda/pairs/tile_forward.cuh"

namespace dml::cuda {

// The type that weights are stored in for a product in GradMath: what it would round them to anyway.
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

// How far apart the values of a tile's log-sum-exps may lie.
template <typename Acc>
inline constexpr Acc kWidestValues = Acc(sizeof(Acc) == 4 ? 40 : 500);

// The largest and least value of the lines' log-sum-exps that have any weight.
template <typename Math, typename Acc>
DML_DEVICE Acc common_value(bool counts, Acc value, Acc* shared, bool& careful) {
    counts = counts && is_finite(value);
    const Acc top = block_max<Math>(counts ? value : -infinity<Acc>(), shared);
    const Acc least = -block_max<Math>(counts ? -value : -infinity<Acc>(), shared + kWarpSize);
    careful = careful || top - least > kWidestValues<Acc>;
    return top;
}

// Shared numbers of each line.
enum LineNumber { kPosBound, kNegBound, kPosWeight, kNegWeight, kLineContext };

// Calls write(i, similarities, weights) for each row i of this thread's pairs: dL/ds.
template <typename Math, typename Formula, typename T, typename Acc, typename Write>
DML_DEVICE void weigh_tile(const TileGroup<T, Acc>& tile_group, const LoadedTile<Math>& tile, int64_t ti,
                           int64_t tj, const Formula& formula, const RowStats<Acc>& stats,
                           const Upstream<Acc>& upstream, const Write& write) {
    using Grid = PairGrid<Math>;
    using Sims = typename Grid::Sims;
    constexpr int kTile = Grid::kTile, kLines = Grid::kLines;
    constexpr bool kNegExp = Formula::kNeg == Accumulator::kLogSumExp,
                   kPosExp = Formula::kPos == Accumulator::kLogSumExp;
    const bool square = tile_group.square;
    Acc* numbers = Grid::line_numbers();
    const int line = int(threadIdx.x);
    const int64_t own_row = line_of_thread<Math>(tile_group, ti, tj);
    RowWeight<Acc> own;
    if (own_row >= 0 && (square || line < kTile)) own = RowWeight<Acc>::load(stats, own_row, upstream);

    bool careful = false;
    Acc top_neg = 0, top_pos = 0;
    Acc* scratch = Grid::scratch(1);
    if constexpr (kNegExp) top_neg = common_value<Math>(own.d_neg != Acc(0), own.neg, scratch, careful);
    if constexpr (kPosExp)
        top_pos = common_value<Math>(own.d_pos != Acc(0), own.pos, scratch + 2 * kWarpSize, careful);
    if (line < kLines) {
        const auto factor = [&](bool exponential, Acc d, Acc value, Acc top) {
            if (!exponential || careful || d == Acc(0)) return d;
            return d * std::exp(top - value);
        };
        // What has no derivative keeps nothing: its exponentials, relative to other lines' values, may
        // overflow.
        const bool neg = own.d_neg != Acc(0), pos = own.d_pos != Acc(0) || (Formula::kPosInNeg && neg);
        numbers[kPosBound * kLines + line] = pos ? own.bounds.pos_below : -infinity<Acc>();
        numbers[kNegBound * kLines + line] = neg ? own.bounds.neg_above : infinity<Acc>();
        numbers[kNegWeight * kLines + line] = factor(kNegExp, own.d_neg, own.neg, top_neg);
        numbers[kPosWeight * kLines + line] = factor(kPosExp, own.d_pos, own.pos, top_pos);
        if constexpr (Formula::kContext) numbers[kLineContext * kLines + line] = own.neg;
    }
    block_sync();

    const ColumnIds<Grid> col_ids;
    // Of the columns (where not square, nothing is kept by one) registers hold what negatives need; a rare
    // positive reads the rest where it lies.
    const auto of_col = [&](LineNumber number, int j) {
        return numbers[number * kLines + kTile + Grid::col(j)];
    };
    Acc col_pos_bound[Grid::kCols], col_neg_bound[Grid::kCols], col_neg[Grid::kCols];
#pragma unroll
    for (int j = 0; j < Grid::kCols; ++j) {
        if constexpr (Formula::kPosInNeg) col_pos_bound[j] = of_col(kPosBound, j);
        col_neg_bound[j] = of_col(kNegBound, j);
        col_neg[j] = of_col(kNegWeight, j);
    }
    const auto weigh_row = [&](int i, const Sims& sims, auto both) {
        constexpr bool kBoth = decltype(both)::value;
        const int at = Grid::row(i), id = Grid::ids()[at];
        const Acc pos_bound = numbers[kPosBound * kLines + at], neg_bound = numbers[kNegBound * kLines + at];
        const Acc neg = numbers[kNegWeight * kLines + at], pos = numbers[kPosWeight * kLines + at];
        const Acc context = Formula::kContext ? numbers[kLineContext * kLines + at] : Acc(0);
        Sims w;
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j) {  // as members of the negatives' accumulator
            const Acc s = sims.s[j];
            const bool positive = col_ids.positive(j, id);
            const auto kept = [&](Acc pos_below, Acc neg_above) {
                if constexpr (Formula::kPosInNeg) return positive ? s < pos_below : s > neg_above;
                return !positive && s > neg_above;
            };
            const bool by_row = kept(pos_bound, neg_bound);
            const bool by_col = kBoth && kept(col_pos_bound[j], col_neg_bound[j]);
            Acc derivative = formula.neg_derivative(s);
            if constexpr (kNegExp) derivative *= quick_exp(formula.neg_term(s) - top_neg);
            Acc sum = by_row ? neg : Acc(0);
            if (by_col) sum += col_neg[j];
            w.s[j] = by_row || by_col ? sum * derivative : Acc(0);
        }
        if (col_ids.any_positive(id)) {  // rare: positives among a warp's 8 x 32 pairs
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                const Acc s = sims.s[j];
                const bool positive = col_ids.positive(j, id);
                const bool by_row = positive && s < pos_bound;
                const bool by_col = kBoth && positive && s < of_col(kPosBound, j);
                Acc sum;
                if constexpr (Formula::kContext) {
                    sum = by_row ? pos * formula.pos_derivative(s, context) : Acc(0);
                    if (by_col)
                        sum += of_col(kPosWeight, j) * formula.pos_derivative(s, of_col(kLineContext, j));
                } else {
                    Acc derivative = formula.pos_derivative(s, Acc(0));
                    if constexpr (kPosExp) derivative *= quick_exp(formula.pos_term(s, Acc(0)) - top_pos);
                    sum = ((by_row ? pos : Acc(0)) + (by_col ? of_col(kPosWeight, j) : Acc(0))) * derivative;
                }
                if (by_row || by_col) w.s[j] += sum;
            }
        }
        return w;
    };
    // Without a number in common: as forward saved what each line came to.
    const auto weigh_carefully = [&](int i) {
        const int row = Grid::row(i);
        const auto weight_of = [&](int64_t at, int64_t rows) {
            return at < rows ? RowWeight<Acc>::load(stats, at, upstream) : RowWeight<Acc>{};
        };
        const RowWeight<Acc> of_row = weight_of(tile.row0 + row, tile_group.rows.points.rows);
#pragma unroll 1
        for (int j = 0; j < Grid::kCols; ++j) {
            const int col = Grid::col(j);
            const bool positive = Grid::ids()[row] == Grid::ids()[kTile + col];
            const Acc s = Grid::sim(row, col);
            RowWeight<Acc> of_line = of_row;
            Acc sum = 0;
#pragma unroll 1
            for (int side = 0; side < (square ? 2 : 1); ++side) {
                if (side == 1) of_line = weight_of(tile.col0 + col, tile_group.cols.points.rows);
                sum += of_line.of(formula, positive, s);
            }
            Grid::sim(row, col) = sum;
        }
        return Grid::sims(i);
    };
#pragma unroll 1
    for (int i = 0; i < Grid::kRows; ++i) {  // times: 8
        const Sims sims = Grid::sims(i);
        Sims w;
        if (careful) {  // rare: lines far below the others of their tile
            w = weigh_carefully(i);
        } else if (square) {
            w = weigh_row(i, sims, std::true_type{});
        } else {
            w = weigh_row(i, sims, std::false_type{});
        }
        write(i, sims, w);
    }
}

// weights: [row_tiles, col_tiles, kTile, kTile] of the tile_group-tile. sums: their sums over each line, or
// null.
template <typename Math, typename Weight, typename T = typename Math::Value,
          typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kPairBlocks<Math>)
    pair_weights(const __grid_constant__ TileGroup<T, Acc> all,
                 const __grid_constant__ AnyFormula<Acc> any_formula, RowStats<Acc> stats,
                 Upstream<Acc> upstream, const uint8_t* kept, Weight* weights, Partials<Acc> sums) {
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
    const Meeting<Grid> meeting = {Grid::scratch(1)};
    const Similarity kind = tile_group.similarity;
    const bool apart = kind.euclidean && !kind.normalize;
    const Acc range = apart ? Acc(1) : stats.header[kRange];

    struct alignas(16) Row {
        Weight w[Grid::kCols];
    };
    Acc col_norms[Grid::kCols], col_sums[Grid::kCols] = {};
#pragma unroll
    for (int j = 0; j < Grid::kCols; ++j) col_norms[j] = apart ? Acc(1) : norms[kTile + Grid::col(j)];
    const auto write = [&](int i, const typename Grid::Sims& sims, const typename Grid::Sims& w) {
        const Acc row_norm = apart ? Acc(1) : norms[Grid::row(i)] * range;
        typename Grid::Sims x = w;
        if (kind.euclidean) {  // rare: distances
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
        if (apart) {  // rare: distances of rows as they come
            Acc row_sum = 0;
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                row_sum += Acc(row.w[j]);
                col_sums[j] += Acc(row.w[j]);
            }
            meeting.put_row(0, i, over_row<Grid>(row_sum, Plus{}));
        }
        *reinterpret_cast<Row*>(out + Grid::row(i) * kTile + Grid::col(0)) = row;
    };
    any_formula.visit([&](const auto& formula) {
        weigh_tile<Math>(tile_group, tile, ti, tj, formula, stats, upstream, write);
    });
    if (!apart) return;
    meeting.put_cols(0, col_sums, Plus{});
    block_sync();
    const int line = int(threadIdx.x), side = line < kTile ? 0 : 1;
    if (line >= Grid::kLines) return;
    const int at = side == 0 ? row_tile * kTile + line : (col_tile - 1) * kTile + line;
    sums.template at<kTile>(tile_group, side, side == 0 ? col_tile : row_tile, 0, at) =
        meeting.get(0, line, Plus{});
}

// Adds the sums of a tile_group-tile's weights to those of its rows and columns; null where not wanted.
template <int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_weights(const __grid_constant__ TileGroup<T, Acc> all, Partials<Acc> partials, const uint8_t* kept,
                  Turn turn, Acc* row_sums, Acc* col_sums) {
    const auto tile_group = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kMergeThreads + int(threadIdx.x);
    Acc* sums = side == 0 ? row_sums : col_sums;
    if (!sums || !has_line<Tile>(tile_group, side, line)) return;
    const int64_t i = merge_row<Tile>(tile_group, side, line);
    Acc sum = i < 0 || turn.first(side) ? Acc(0) : sums[i];
    const Acc none[1] = {Acc(0)};
    for_slots<Tile>(tile_group, partials, side, line, kept, kHasGradient, none,
                    [&](const Acc(&q)[1][kMergeBatch]) {
#pragma unroll
                        for (int b = 0; b < kMergeBatch; ++b) sum += q[0][b];
                    });
    if (i >= 0) sums[i] = sum;
}

}  // namespace dml::cuda
