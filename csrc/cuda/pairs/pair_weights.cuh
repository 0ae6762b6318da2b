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

#include "cuda/pairs/pair_weights.h"
#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/row_weights.cuh"
#include "cuda/pairs/tile_need.cuh"
#include "cuda/pairs/tile_pairs.cuh"

namespace dml::cuda {

// How far apart the log-sum-exps of a tile's lines may lie.
template <typename Acc>
inline constexpr Acc kWidestValues = Acc(sizeof(Acc) == 4 ? 40 : 500);

// The largest log-sum-exp of the lines that count; careful is set where the least lies too far below.
template <typename Acc>
DML_DEVICE Acc common_value(bool counts, Acc value, Acc* shared, bool& careful) {
    counts = counts && is_finite(value);
    const Acc top = block_max(counts ? value : -infinity<Acc>(), shared);
    const Acc least = -block_max(counts ? -value : -infinity<Acc>(), shared + kWarpSize);
    careful = careful || top - least > kWidestValues<Acc>;
    return top;
}

// Quantities that warps exchange: a line's sum, and its largest weight times the scale of the point it multiplies.
inline constexpr int kWeightSum = 0, kLargestWeight = 1, kWeightQuantities = 2;

// Shared numbers of each line.
enum LineNumber { kPosBound, kNegBound, kPosWeight, kNegWeight, kLineValue };

// ---- dL/ds of a tile's pairs -----------------------------------------------------------------------------

template <typename Formula, typename Acc>
struct TileWeights {
    using Grid = PairGrid<Acc>;
    using Sims = typename Grid::Sims;
    static constexpr int kTile = Grid::kTile, kLines = Grid::kLines;
    static constexpr bool kNegExp = Formula::kNeg == Accumulator::kLogSumExp,
                          kPosExp = Formula::kPos == Accumulator::kLogSumExp;

    const TileGroup<Acc>& tile_group;
    const LoadedTile<Acc>& tile;
    const Formula& formula;
    const RowStats<Acc>& row_stats;
    const Upstream<Acc>& upstream;
    Acc top_neg = 0, top_pos = 0;  // what exponentials are relative to
    bool careful = false;          // each line has its own exponentials

    // 1. Bounds and factors of each line, by one thread a line.
    DML_DEVICE void load_lines(int64_t ti, int64_t tj) {
        Acc* numbers = Grid::line_numbers();
        const int line = int(threadIdx.x);
        const int64_t row = line_of_thread(tile_group, ti, tj);
        RowWeight<Acc> weight;
        if (row >= 0 && (tile_group.square || line < kTile))
            weight = RowWeight<Acc>::load(row_stats, row, upstream);
        Acc* scratch = Grid::scratch(kWeightQuantities);
        if constexpr (kNegExp) top_neg = common_value(weight.d_neg != Acc(0), weight.neg, scratch, careful);
        if constexpr (kPosExp)
            top_pos = common_value(weight.d_pos != Acc(0), weight.pos, scratch + 2 * kWarpSize, careful);
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
        const RowWeight<Acc> row_weight = load(tile.row0 + row, tile_group.rows.count);
#pragma unroll 1
        for (int j = 0; j < Grid::kCols; ++j) {
            const int col = Grid::col(j);
            const bool positive = Grid::ids()[row] == Grid::ids()[kTile + col];
            const Acc s = Grid::sim(row, col);
            RowWeight<Acc> line_weight = row_weight;
            Acc sum = 0;
#pragma unroll 1
            for (int side = 0; side < (tile_group.square ? 2 : 1); ++side) {
                if (side == 1) line_weight = load(tile.col0 + col, tile_group.cols.count);
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

// A weight as its image has it, but for scales, which are powers of two.
template <typename Layout, typename Acc>
DML_DEVICE Acc stored_weight(Acc x) {
    if constexpr (std::is_same_v<typename Layout::Element, __nv_bfloat16>) {
        return Acc(__nv_bfloat16(x));
    } else if constexpr (kScalesWeights<Layout> && Layout::kParts == 1) {
        return Acc(RoundedToTf32(x));  // a float16 has as many digits
    } else {
        return x;
    }
}

// A thread's weights in row i of a tile, to its image.
template <typename Layout, typename Grid>
DML_DEVICE void write_weights(unsigned char* image, int i, const typename Grid::Sims& weights) {
    constexpr int kElements = kChunkBytes / int(sizeof(typename Layout::Element));
#pragma unroll
    for (int j = 0; j < Grid::kCols; j += kElements) {
        const int col = Grid::col(j), column = col % Layout::kColumns;
        write_chunk<Layout>(weights.s + j,
                            image + col / Layout::kColumns * Layout::kBlockBytes +
                                swizzled_chunk(unsigned(Grid::row(i)), unsigned(column / kElements)));
    }
}

// Weights' sums of each line are written where distances of rows that are not normalised need them.
template <typename Layout, typename Acc>
__global__ void __launch_bounds__(kTileThreads, kPairBlocks<Acc>)
    pair_weights(const __grid_constant__ TileGroup<Acc> all,
                 const __grid_constant__ AnyFormula<Acc> any_formula,
                 const __grid_constant__ TileNeed<Acc> need, Upstream<Acc> upstream,
                 const __grid_constant__ GroupWeights<Layout> to, Partials<Acc> sums) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Traits = TileTraits<Acc>;
    using Grid = PairGrid<Acc>;
    using Sims = typename Grid::Sims;
    constexpr int kTile = Traits::kTile;
    constexpr bool kScales = kScalesWeights<Layout>;
    const auto tile_group = all.in_use();
    const int row_tile = int(blockIdx.y), col_tile = int(blockIdx.x);
    const int64_t ti = tile_group.row_tile + row_tile, tj = tile_group.col_tile + col_tile;
    if (!tile_group.has(ti, tj) || !need.has_gradient(tile_group, ti, tj)) return;
    const RowStats<Acc>& row_stats = need.row_stats;
    const LoadedTile<Acc> tile = load_pairs(tile_group, ti, tj, false);
    const Acc* norms = shared_array<Acc>(Traits::kNorms, 2 * kTile);
    const int64_t slot = tile_group.slot(ti, tj);
    const auto image_of = [&](int side) { return to.images[side] + slot * to.kPlaceBytes; };
    const WarpExchange<Grid> exchange = {Grid::scratch(kWeightQuantities)};
    const Similarity kind = tile_group.similarity;
    const bool unscaled = kind.euclidean && !kind.normalize;
    const Acc range = unscaled ? Acc(1) : row_stats.header[kRange];
    const int line = int(threadIdx.x), side = line < kTile ? 0 : 1;
    // Of the points' images, in the place of labels that have become ids; load_lines has a barrier.
    Acc* scales = reinterpret_cast<Acc*>(Traits::labels());  // [2 kTile]
    if (kScales && line < Grid::kLines) {
        const Image& image = side == 0 ? tile_group.row_image : tile_group.col_image;
        scales[line] =
            image.scales ? Acc(image.scales[(side == 0 ? row_tile : col_tile - 1) * kTile + line]) : Acc(1);
    }

    // 1. Weights; where they are scaled they take the place of the similarities for now.
    Acc col_norms[Grid::kCols], col_sums[Grid::kCols] = {};
#pragma unroll
    for (int j = 0; j < Grid::kCols; ++j) col_norms[j] = unscaled ? Acc(1) : norms[kTile + Grid::col(j)];
    const auto write = [&](int i, const Sims& sims, const Sims& w) {
        const Acc row_norm = unscaled ? Acc(1) : norms[Grid::row(i)] * range;
        Sims x = w;
        if (kind.euclidean) {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) x.s[j] = by_distance(x.s[j], sims.s[j]);
        }
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j)
            x.s[j] = stored_weight<Layout>(x.s[j] * row_norm * col_norms[j]);
        if (unscaled) {
            Acc row_sum = 0;
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                row_sum += x.s[j];
                col_sums[j] += x.s[j];
            }
            exchange.put_row(kWeightSum, i, merge_lanes<Grid>(row_sum, Plus{}));
        }
        if constexpr (kScales) {
            Grid::put_sims(i, x);
        } else {
            write_weights<Layout, Grid>(image_of(0), i, x);
        }
    };
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        TileWeights<Formula, Acc> tile_weights = {tile_group, tile, formula, row_stats, upstream};
        tile_weights.load_lines(ti, tj);
        tile_weights.for_rows(write);
    });
    if (!unscaled && !kScales) return;
    if (unscaled) exchange.put_cols(kWeightSum, col_sums, Plus{});
    if constexpr (kScales) {  // 2. Each line's largest weight, at the scales of the points.
        Acc col_largest[Grid::kCols] = {};
#pragma unroll 1
        for (int i = 0; i < Grid::kRows; ++i) {
            const Sims x = Grid::sims(i);
            const Acc scale = scales[Grid::row(i)];
            Acc largest = 0;
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                const Acc size = std::fabs(x.s[j]);
                largest = std::fmax(largest, size * scales[kTile + Grid::col(j)]);
                col_largest[j] = std::fmax(col_largest[j], size * scale);
            }
            exchange.put_row(kLargestWeight, i, merge_lanes<Grid>(largest, Maximum{}));
        }
        exchange.put_cols(kLargestWeight, col_largest, Maximum{});
    }
    block_sync();
    if (unscaled && line < Grid::kLines) {
        const int at = side == 0 ? row_tile * kTile + line : (col_tile - 1) * kTile + line;
        sums.at(tile_group, side, side == 0 ? col_tile : row_tile, 0, at) =
            exchange.get(kWeightSum, line, Plus{});
    }
    if constexpr (kScales) {  // 3. The power of two of each line, and the images.
        Acc* ups = Grid::line_numbers();
        if (line < Grid::kLines) {
            ups[line] = scale_up(exchange.get(kLargestWeight, line, Maximum{}));
            to.scales[side][slot * kTile + line % kTile] = reciprocal_of_power(ups[line]);
        }
        block_sync();
#pragma unroll 1
        for (int i = 0; i < Grid::kRows; ++i) {
            const Sims x = Grid::sims(i);
            const Acc scale = scales[Grid::row(i)], up = ups[Grid::row(i)];
            Sims by_row, by_col;
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                by_row.s[j] = x.s[j] * scales[kTile + Grid::col(j)] * up;
                by_col.s[j] = x.s[j] * scale * ups[kTile + Grid::col(j)];
            }
            write_weights<Layout, Grid>(image_of(0), i, by_row);
            write_weights<Layout, Grid>(image_of(1), i, by_col);
        }
    }
}

}  // namespace dml::cuda
