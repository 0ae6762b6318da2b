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

#include "tile_forward.cuh"

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
template <>
struct WeightOf<Bf16Math> {
    using Type = __nv_bfloat16;
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

// Shared numbers of each line. A positive is kept when -s > -pos_below, so that one comparison does for both
// kinds: each bound is a least value of s or of -s.
enum LineNumber { kPosBound, kNegBound, kPosWeight, kNegWeight, kLineContext };

// Calls write(i, weights of this thread's pairs of its row i): dL/ds.
template <typename Math, bool BothSides, typename Law, typename T, typename Acc, typename Write>
DML_DEVICE void weigh_tile(const SuperTile<T, Acc>& super, const LoadedTile<Math>& tile, int64_t ti,
                           int64_t tj, const Law& law, const RowStats<Acc>& stats,
                           const Upstream<Acc>& upstream, const Write& write) {
    using Grid = PairGrid<Math>;
    constexpr int kTile = Grid::kTile, kLines = Grid::kLines;
    constexpr bool kNegExp = Law::kNeg == Fold::kLogSumExp, kPosExp = Law::kPos == Fold::kLogSumExp;
    Acc* numbers = Grid::line_numbers();
    const int line = int(threadIdx.x);
    const int64_t i = line_of_thread<Math>(super, ti, tj);
    RowWeight<Acc> own;
    if (i >= 0 && (BothSides || line < kTile)) own = RowWeight<Acc>::load(stats, i, upstream);

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
        const bool neg = own.d_neg != Acc(0), pos = own.d_pos != Acc(0) || (Law::kPosInNeg && neg);
        numbers[kPosBound * kLines + line] = pos ? -own.bounds.pos_below : infinity<Acc>();
        numbers[kNegBound * kLines + line] = neg ? own.bounds.neg_above : infinity<Acc>();
        numbers[kNegWeight * kLines + line] = factor(kNegExp, own.d_neg, own.neg, top_neg);
        numbers[kPosWeight * kLines + line] = factor(kPosExp, own.d_pos, own.pos, top_pos);
        if constexpr (Law::kContext) numbers[kLineContext * kLines + line] = own.neg;
    }
    block_sync();

    if (careful) {  // rare: lines far below the others of their tile
#pragma unroll 1
        for (int i = 0; i < Grid::kRows; ++i) {
            const int row = Grid::row(i);
            const auto sims = Grid::sims(i);
            typename Grid::Sims w;
            const RowWeight<Acc> of_row = tile.row0 + row < super.rows.points.rows
                                              ? RowWeight<Acc>::load(stats, tile.row0 + row, upstream)
                                              : RowWeight<Acc>{};
#pragma unroll 1
            for (int j = 0; j < Grid::kCols; ++j) {
                const int col = Grid::col(j);
                const bool positive = Grid::ids()[row] == Grid::ids()[kTile + col];
                const Acc s = Grid::sim(row, col);
                Acc sum = of_row.of(law, positive, s);
                if (BothSides && tile.col0 + col < super.cols.points.rows)
                    sum += RowWeight<Acc>::load(stats, tile.col0 + col, upstream).of(law, positive, s);
                Grid::sim(row, col) = sum;
            }
            w = Grid::sims(i);
            write(i, sims, w);
        }
        return;
    }

    int col_ids[Grid::kCols];
    Acc col_bound[Grid::kCols][2], col_pos[Grid::kCols], col_neg[Grid::kCols];
    Acc col_context[Grid::kCols];
#pragma unroll
    for (int j = 0; j < Grid::kCols; ++j) {
        const int at = kTile + Grid::col(j);
        col_ids[j] = Grid::ids()[at];
        if constexpr (BothSides) {
            col_bound[j][0] = numbers[kNegBound * kLines + at];
            col_bound[j][1] = numbers[kPosBound * kLines + at];
            col_neg[j] = numbers[kNegWeight * kLines + at];
            col_pos[j] = numbers[kPosWeight * kLines + at];
            col_context[j] = Law::kContext ? numbers[kLineContext * kLines + at] : Acc(0);
        }
    }
#pragma unroll 1
    for (int i = 0; i < Grid::kRows; ++i) {  // times: 8
        const int at = Grid::row(i), id = Grid::ids()[at];
        const Acc pos_bound = numbers[kPosBound * kLines + at], neg_bound = numbers[kNegBound * kLines + at];
        const Acc neg = numbers[kNegWeight * kLines + at], pos = numbers[kPosWeight * kLines + at];
        const Acc context = Law::kContext ? numbers[kLineContext * kLines + at] : Acc(0);
        const auto sims = Grid::sims(i);
        typename Grid::Sims w;
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j) {
            const Acc s = sims.s[j];
            const bool positive = id == col_ids[j];
            const Acc sided = positive ? -s : s;
            const bool by_row = sided > (positive ? pos_bound : neg_bound);
            const bool by_col = BothSides && sided > (positive ? col_bound[j][1] : col_bound[j][0]);
            const auto of_lines = [&](Acc of_row, Acc of_col) {
                return (by_row ? of_row : Acc(0)) + (by_col ? of_col : Acc(0));
            };
            Acc sum;
            if constexpr (kNegExp && kPosExp && !Law::kPosInNeg && !Law::kContext) {
                const Acc z = positive ? law.pos_term(s, Acc(0)) - top_pos : law.neg_term(s) - top_neg;
                const Acc slope = positive ? law.pos_slope(s, Acc(0)) : law.neg_slope(s);
                const Acc row_weight = positive ? pos : neg, col_weight = positive ? col_pos[j] : col_neg[j];
                sum = of_lines(row_weight, col_weight) * (quick_exp(z) * slope);
            } else {
                Acc by_neg = law.neg_slope(s);
                if constexpr (kNegExp) by_neg *= quick_exp(law.neg_term(s) - top_neg);
                sum = !positive || Law::kPosInNeg ? of_lines(neg, col_neg[j]) * by_neg : Acc(0);
                if (positive) {  // for most laws too dear to be done for all
                    if constexpr (Law::kContext) {
                        sum += of_lines(pos * law.pos_slope(s, context),
                                        BothSides ? col_pos[j] * law.pos_slope(s, col_context[j]) : Acc(0));
                    } else {
                        Acc by_pos = of_lines(pos, col_pos[j]) * law.pos_slope(s, Acc(0));
                        if constexpr (kPosExp) by_pos *= quick_exp(law.pos_term(s, Acc(0)) - top_pos);
                        sum += by_pos;
                    }
                }
            }
            sum = by_row || by_col ? sum : Acc(0);
            w.s[j] = sum;
        }
        write(i, sims, w);
    }
}

// weights: [row_tiles, col_tiles, kTile, kTile] of the super-tile. sums: their sums over each line, or null.
template <typename Math, typename Weight, typename T = typename Math::Value,
          typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kPairBlocks<Math>)
    pair_weights(const __grid_constant__ SuperTile<T, Acc> all, const __grid_constant__ AnyLaw<Acc> any_law,
                 RowStats<Acc> stats, Upstream<Acc> upstream, const uint8_t* kept, Weight* weights,
                 Partials<Acc> sums) {
    using Traits = TileTraits<Math>;
    using Grid = PairGrid<Math>;
    constexpr int kTile = Traits::kTile;
    const auto super = all.template in_use<kTile>();
    const int row_tile = int(blockIdx.y), col_tile = int(blockIdx.x);
    const int64_t ti = super.row_tile + row_tile, tj = super.col_tile + col_tile;
    if (!super.has(ti, tj) || (kept && !(kept[super.tile_index(ti, tj)] & kHasGradient))) return;
    const LoadedTile<Math> tile = load_pairs<Math>(super, ti, tj, false);
    const Acc* norms = shared_array<Acc>(Traits::kNorms, 2 * kTile);
    Weight* out = weights + (int64_t(row_tile) * super.col_tiles + col_tile) * kTile * kTile;
    const Meeting<Grid> meeting = {Grid::scratch(1)};
    const Similarity kind = super.similarity;
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
        if (apart) {
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
    any_law.visit([&](const auto& law) {
        if (super.square) {
            weigh_tile<Math, true>(super, tile, ti, tj, law, stats, upstream, write);
        } else {
            weigh_tile<Math, false>(super, tile, ti, tj, law, stats, upstream, write);
        }
    });
    if (!apart) return;
#pragma unroll
    for (int j = 0; j < Grid::kCols; ++j) meeting.put_col(0, j, over_col<Grid>(col_sums[j], Plus{}));
    block_sync();
    const int line = int(threadIdx.x), side = line < kTile ? 0 : 1;
    if (line >= Grid::kLines) return;
    const int at = side == 0 ? row_tile * kTile + line : (col_tile - 1) * kTile + line;
    sums.template at<kTile>(super, side, side == 0 ? col_tile : row_tile, 0, at) =
        meeting.get(0, line, Plus{});
}

// Adds the sums of a super-tile's weights to those of its rows and columns; null where not wanted.
template <int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kFoldThreads, 1)
    fold_weights(const __grid_constant__ SuperTile<T, Acc> all, Partials<Acc> partials, const uint8_t* kept,
                 Turn turn, Acc* row_sums, Acc* col_sums) {
    const auto super = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kFoldThreads + int(threadIdx.x);
    const int64_t i = fold_row<Tile>(super, side, line);
    if (i < 0) return;
    Acc* sums = side == 0 ? row_sums : col_sums;
    if (!sums) return;
    Acc& total = sums[i];
    Acc sum = turn.first(side) ? Acc(0) : total;
    const Acc none[1] = {Acc(0)};
    for_slots<Tile>(super, partials, side, line, kept, kHasGradient, none,
                    [&](const Acc(&q)[1]) { sum += q[0]; });
    total = sum;
}

}  // namespace dml::cuda
