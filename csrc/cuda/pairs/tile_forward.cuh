// Large batches, forward: streams over the tiles, each followed by a merge into the rows' statistics. The
// first (only with mining) finds every row's hardest pairs, the second what the formula gathers over the
// pairs kept; a formula whose positives see what the negatives came to takes a third. Tiles leave partial
// results for their rows and columns; which are merged in the order of the tiles, one thread a row, so that
// the result never depends on which block came first.
//
// A term does not depend on whose row it is. So log-sum-exps within a tile are relative to one number, the
// tile's largest term, and one exponential a pair serves its row and its column. A line that lies so far
// below that digits would be lost is gathered again by one thread, relative to its own largest term.
#pragma once

#include "cuda/pairs/tile_pairs.cuh"

namespace dml::cuda {

// A tile_group-tile's results for its lines: for each of 2 sides [slots][kQuantities][lines]. A line is a row
// (side 0) or column (side 1) of the tile_group-tile, a slot the tile on the other axis.
inline constexpr int kQuantities = 4;

template <typename Acc>
struct Partials {
    Acc* data;

    template <int Tile, typename T>
    DML_DEVICE Acc& at(const TileGroup<T, Acc>& tile_group, int side, int slot, int quantity,
                       int line) const {
        const int lines = (side == 0 ? tile_group.row_tiles : tile_group.col_tiles) * Tile;
        const int64_t of_side = int64_t(tile_group.row_tiles) * tile_group.col_tiles * Tile * kQuantities;
        return data[side * of_side + (int64_t(slot) * kQuantities + quantity) * lines + line];
    }
};
inline int64_t partials_size(int64_t tiles, int tile, bool both_sides) {
    return (both_sides ? 2 : 1) * tiles * tile * kQuantities;
}

// Bits of a tile's kept flag.
inline constexpr uint8_t kHasGradient = 1;  // some derivative in it can be not 0
inline constexpr uint8_t kHasPartials = 2;  // the present stream has left partial results

// ---- every row's norm ---------------------------------------------------------------------------------

inline constexpr int kNormThreads = 256;

// One warp a row. open: also sets the row's bounds so that everything is kept.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kNormThreads)
    prepare_rows(Rows<T, Acc> rows, Similarity similarity, RowStats<Acc> stats, bool open) {
    const int64_t i = int64_t(blockIdx.x) * (kNormThreads / kWarpSize) + warp_id();
    const Matrix<T>& points = rows.points;
    if (i >= points.rows) return;
    Acc squares = 0;
    for (int64_t d = lane_id(); d < points.cols; d += kWarpSize) {
        const Acc x = Acc(points.data[i * points.stride + d]);
        squares = std::fma(x, x, squares);
    }
    squares = warp_sum(squares);
    if (lane_id() != 0) return;
    rows.norms[i] = row_norm(squares, points, i, similarity);
    if (!open) return;
    stats.neg_above[i] = Bounds<Acc>::all().neg_above;
    stats.pos_below[i] = Bounds<Acc>::all().pos_below;
}

// ---- the hardest pairs ------------------------------------------------------------------------------------

// tile_extremes: [tiles, 2] the least positive and greatest negative similarity of each tile, or null.
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kPairBlocks<Math>)
    find_extremes(const __grid_constant__ TileGroup<T, Acc> all, Partials<Acc> partials, Acc* tile_extremes) {
    using Grid = PairGrid<Math>;
    constexpr int kTile = Grid::kTile;
    const auto tile_group = all.template in_use<kTile>();
    const int row = int(blockIdx.y), col = int(blockIdx.x);
    const int64_t ti = tile_group.row_tile + row, tj = tile_group.col_tile + col;
    if (!tile_group.has(ti, tj)) return;
    const LoadedTile<Math> tile = load_pairs<Math>(tile_group, ti, tj, true);
    const Meeting<Grid> meeting = {Grid::scratch(2)};

    const ColumnIds<Grid> col_ids;
    Acc min_pos[Grid::kCols], max_neg[Grid::kCols];  // of the columns
#pragma unroll
    for (int j = 0; j < Grid::kCols; ++j) {
        min_pos[j] = infinity<Acc>();
        max_neg[j] = -infinity<Acc>();
    }
    bool any_positive = false;  // of the warp
#pragma unroll 1
    for (int i = 0; i < Grid::kRows; ++i) {  // times: 8
        const int id = Grid::ids()[Grid::row(i)];
        const auto sims = Grid::sims(i);  // NaN where there is no pair, which std::fmin and fmax pass over
        Extremes<Acc> of_row;
        if (col_ids.any_positive(id)) {  // rare: positives among a warp's 8 x 32 pairs
            any_positive = true;
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                const bool positive = col_ids.positive(j, id);
                const Acc pos = positive ? sims.s[j] : infinity<Acc>();
                const Acc neg = positive ? -infinity<Acc>() : sims.s[j];
                of_row.merge({pos, neg});
                min_pos[j] = std::fmin(min_pos[j], pos);
                max_neg[j] = std::fmax(max_neg[j], neg);
            }
            of_row.min_pos = over_row<Grid>(of_row.min_pos, Least{});
        } else {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                of_row.max_neg = std::fmax(of_row.max_neg, sims.s[j]);
                max_neg[j] = std::fmax(max_neg[j], sims.s[j]);
            }
        }
        meeting.put_row(0, i, of_row.min_pos);
        meeting.put_row(1, i, over_row<Grid>(of_row.max_neg, Greatest{}));
    }
    if (!any_positive) {
        meeting.put_every_col(0, infinity<Acc>());
    } else {
        meeting.put_cols(0, min_pos, Least{});
    }
    meeting.put_cols(1, max_neg, Greatest{});
    block_sync();

    const int line = int(threadIdx.x);
    Extremes<Acc> found;
    if (line < (tile_group.square ? Grid::kLines : kTile)) {
        found = {meeting.get(0, line, Least{}), meeting.get(1, line, Greatest{})};
        const int side = line < kTile ? 0 : 1;
        const int slot = side == 0 ? col : row,
                  at = side == 0 ? row * kTile + line : (col - 1) * kTile + line;
        partials.template at<kTile>(tile_group, side, slot, 0, at) = found.min_pos;
        partials.template at<kTile>(tile_group, side, slot, 1, at) = found.max_neg;
    }
    if (!tile_extremes) return;
    Acc* of_warps = Grid::line_numbers();
    const Acc least = warp_min(found.min_pos), greatest = warp_max(found.max_neg);
    if (lane_id() == 0) {
        of_warps[warp_id()] = least;
        of_warps[kWarpSize + warp_id()] = greatest;
    }
    block_sync();
    if (threadIdx.x != 0) return;
    Extremes<Acc> of_tile;
    for (int w = 0; w < TileTraits<Math>::kThreads / kWarpSize; ++w)
        of_tile.merge({of_warps[w], of_warps[kWarpSize + w]});
    const int64_t index = tile_group.tile_index(ti, tj);
    tile_extremes[2 * index] = of_tile.min_pos;
    tile_extremes[2 * index + 1] = of_tile.max_neg;
}

// ---- what the formula gathers -----------------------------------------------------------------------------

// Whether any line of a tile may keep anything of it, from the tile's extremes and the lines' bounds.
template <typename Math, typename T, typename Acc>
DML_DEVICE bool may_keep(const TileGroup<T, Acc>& tile_group, int64_t ti, int64_t tj,
                         const RowStats<Acc>& stats, const Acc* tile_extremes, bool negatives) {
    const int64_t index = tile_group.tile_index(ti, tj);
    const int64_t i = line_of_thread<Math>(tile_group, ti, tj);
    const bool counts = i >= 0 && (tile_group.square || int(threadIdx.x) < TileTraits<Math>::kTile);
    const bool own = counts && (tile_extremes[2 * index] < stats.pos_below[i] ||
                                (negatives && tile_extremes[2 * index + 1] > stats.neg_above[i]));
    return block_any<Math>(own);
}

// Whether any pair of a tile has one label.
template <typename Math, typename T, typename Acc>
DML_DEVICE bool has_positives(const TileGroup<T, Acc>& tile_group, int64_t ti, int64_t tj) {
    using Traits = TileTraits<Math>;
    constexpr int kTile = Traits::kTile;
    int64_t* labels = shared_array<int64_t>(Traits::kLabels, 2 * kTile);
    const int64_t i = line_of_thread<Math>(tile_group, ti, tj);
    const int line = int(threadIdx.x);
    if (i >= 0) labels[line] = (line < kTile ? tile_group.rows : tile_group.cols).labels[i];
    block_sync();
    bool any = false;
    if (i >= 0 && line < kTile) {
        const int64_t cols = tile_group.cols.points.rows - tj * kTile;
        for (int c = 0; c < (cols < kTile ? int(cols) : kTile); ++c)
            any = any || labels[kTile + c] == labels[line];
    }
    return block_any<Math>(any);
}

// exp(x) for x <= 0 or little more, to about 2^-23 (1 + |x|).
template <typename Acc>
DML_DEVICE Acc quick_exp(Acc x) {
    if constexpr (sizeof(Acc) == 4) {
        return exp2_approx(x * 1.44269504f);
    } else {
        return std::exp(x);
    }
}

// Exponentials count at least kLeastExp, so that a line that kept nothing is told from one far below the
// tile's largest term; where all of them together are less than kLeastSum the line is gathered again.
template <typename Acc>
inline constexpr Acc kLeastExp = Acc(sizeof(Acc) == 4 ? 1e-36 : 1e-300);
template <typename Acc>
inline constexpr Acc kLeastSum = Acc(sizeof(Acc) == 4 ? 1e-26 : 1e-270);

// Which quantities the threads of a line add up, for a formula and a stage.
template <typename Formula, Stage kStage>
struct Summed {
    static constexpr bool kNegs = kStage != Stage::kPositives, kPoss = kStage != Stage::kNegatives;
    static constexpr bool kNegExp = kNegs && Formula::kNeg == Accumulator::kLogSumExp;
    static constexpr bool kPosExp = kPoss && Formula::kPos == Accumulator::kLogSumExp;
    static constexpr bool kNegCount = kNegs && !kNegExp, kPosCount = kPoss && !kPosExp;
    static constexpr bool kContext = kStage == Stage::kPositives;
    static_assert(!(Formula::kContext && (Formula::kPos != Accumulator::kSum || Formula::kPosInNeg)),
                  "terms that see a context are summed, in a stage of their own");
    static constexpr int kNegSum = 0, kAtNegCount = kNegSum + kNegs, kPosSum = kAtNegCount + kNegCount,
                         kAtPosCount = kPosSum + kPoss, kAtContext = kAtPosCount + kPosCount;
    static constexpr int kCount = kAtContext + kContext;
};

// How many quantities the kernels' scratch must have room for.
inline int most_summed(FormulaId formula) {
    int most = 0;
    with_formula(formula, [&](auto tag) {
        using Formula = typename decltype(tag)::template Of<float>;
        most = Formula::kContext ? std::max(Summed<Formula, Stage::kNegatives>::kCount,
                                            Summed<Formula, Stage::kPositives>::kCount)
                                 : Summed<Formula, Stage::kBoth>::kCount;
    });
    return most;
}

// One line's sums under way; what a formula and stage do not use, no register holds.
template <typename Formula, Stage kStage, typename Acc>
struct LineSums {
    using Which = Summed<Formula, kStage>;
    Acc neg = 0, neg_count = 0, pos = 0, pos_count = 0, context = 0;

    template <typename F>
    DML_DEVICE void each(const F& f) {
        if constexpr (Which::kNegs) f(Which::kNegSum, neg);
        if constexpr (Which::kNegCount) f(Which::kAtNegCount, neg_count);
        if constexpr (Which::kPoss) f(Which::kPosSum, pos);
        if constexpr (Which::kPosCount) f(Which::kAtPosCount, pos_count);
        if constexpr (Which::kContext) f(Which::kAtContext, context);
    }
};

// What a tile's pairs add to their lines.
template <typename Formula, Stage kStage, typename Acc>
struct PairTerms {
    using Which = Summed<Formula, kStage>;
    using Sums = LineSums<Formula, kStage, Acc>;
    const Formula& formula;
    Acc top_neg, top_pos;  // what exponentials are relative to
    Acc zero_counts;       // what a summand that is 0 counts

    static DML_DEVICE Acc at_least(Acc e) { return e > kLeastExp<Acc> ? e : kLeastExp<Acc>; }
    DML_DEVICE Acc counted(Acc term) const { return term != Acc(0) ? Acc(1) : zero_counts; }

    DML_DEVICE Acc neg_term(Acc s) const {
        if constexpr (Which::kNegExp) return at_least(quick_exp(formula.neg_term(s) - top_neg));
        return formula.neg_term(s);
    }
    DML_DEVICE Acc pos_term(Acc s) const {
        if constexpr (Which::kPosExp) return at_least(quick_exp(formula.pos_term(s, Acc(0)) - top_pos));
        return Formula::kContext ? Acc(0) : formula.pos_term(s, Acc(0));
    }
    // As a member of the negatives' accumulator; term as neg_term says.
    DML_DEVICE void add_negative(Sums& line, bool positive, Acc s, Acc term, Acc below, Acc above) const {
        const bool keep = Formula::kPosInNeg ? (positive ? s < below : s > above) : !positive && s > above;
        if (!keep) return;
        line.neg += term;
        if constexpr (Which::kNegCount) line.neg_count += counted(term);
    }
    // As one of the positives; term as pos_term says.
    DML_DEVICE void add_positive(Sums& line, bool positive, Acc s, Acc term, Acc below, Acc context) const {
        if (!(positive && s < below)) return;
        if constexpr (Formula::kContext) term = formula.pos_term(s, context);
        line.pos += term;
        if constexpr (Which::kPosCount) line.pos_count += counted(term);
        if constexpr (Which::kContext) line.context += formula.pos_context(s, context);
    }
};

// A line's log-sum-exps again, relative to its own largest terms, by one thread.
template <typename Math, Stage kStage, typename Formula, typename Acc>
DML_DEVICE void gather_carefully(const Formula& formula, int line, Acc below, Acc above,
                                 Acc (&q)[kQuantities]) {  // rare: a line far below the others of its tile
    using Grid = PairGrid<Math>;
    using Which = Summed<Formula, kStage>;
    constexpr int kTile = Grid::kTile, kPitch = TileTraits<Math>::kSimPitch;
    const bool is_row = line < kTile;
    const Acc* sims = is_row ? &Grid::sim(line, 0) : &Grid::sim(0, line - kTile);
    const int* others = Grid::ids() + (is_row ? kTile : 0);
    const int id = Grid::ids()[line];
    Acc tops[2] = {-infinity<Acc>(), -infinity<Acc>()}, sums[2] = {Acc(0), Acc(0)};
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
        for (int k = 0; k < kTile; ++k) {
            const Acc s = sims[k * (is_row ? 1 : kPitch)];
            const bool positive = others[k] == id;
            if (positive ? !(s < below) : !(s > above)) continue;
            const auto add = [&](int kind, Acc z) {
                if (pass == 0) {
                    tops[kind] = z > tops[kind] ? z : tops[kind];
                } else {
                    sums[kind] += std::exp(z - tops[kind]);
                }
            };
            if constexpr (Which::kNegExp) {
                if (!positive || Formula::kPosInNeg) add(0, formula.neg_term(s));
            }
            if constexpr (Which::kPosExp) {
                if (positive) add(1, formula.pos_term(s, Acc(0)));
            }
        }
    }
    if constexpr (Which::kNegExp) {
        q[0] = tops[0];
        q[1] = sums[0];
    }
    if constexpr (Which::kPosExp) {
        q[2] = tops[1];
        q[3] = sums[1];
    }
}

// The largest of every thread's numbers.
template <typename Math, typename Acc>
DML_DEVICE Acc block_max(Acc x, Acc* shared) {
    constexpr int kWarps = TileTraits<Math>::kThreads / kWarpSize, kAtOnce = 16 / int(sizeof(Acc));
    x = warp_max(x);
    if (lane_id() == 0) shared[warp_id()] = x;
    block_sync();
    const auto* some = reinterpret_cast<const Vector<Acc, kAtOnce>*>(shared);  // aligned to 16 bytes
#pragma unroll
    for (int w = 0; w < kWarps / kAtOnce; ++w) {
        const auto y = some[w];
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) x = std::fmax(x, y.value[e]);
    }
    return x;
}

// Gathers a tile for its rows and, where square, its columns. Returns whether this thread's line found a
// derivative that can be not 0.
template <typename Math, Stage kStage, typename Formula, typename T, typename Acc>
DML_DEVICE bool gather_tile(const TileGroup<T, Acc>& tile_group, const LoadedTile<Math>& tile, int64_t ti,
                            int64_t tj, const Formula& formula, const RowStats<Acc>& stats,
                            const Partials<Acc>& partials, bool count_zeros) {
    using Grid = PairGrid<Math>;
    using Which = Summed<Formula, kStage>;
    using Sums = LineSums<Formula, kStage, Acc>;
    constexpr int kTile = Grid::kTile, kLines = Grid::kLines;
    const int line = int(threadIdx.x);
    const int lines = tile_group.square ? kLines : kTile;

    // Of each line: bounds and context.
    Acc* numbers = Grid::line_numbers();
    if (line < kLines) {
        const int64_t i = line_of_thread<Math>(tile_group, ti, tj);
        const bool used = i >= 0 && line < lines;
        numbers[line] = used ? stats.pos_below[i] : Bounds<Acc>::none().pos_below;
        numbers[kLines + line] = used ? stats.neg_above[i] : Bounds<Acc>::none().neg_above;
        if constexpr (Which::kContext) numbers[2 * kLines + line] = used ? stats.neg[i] : Acc(0);
    }
    const ColumnIds<Grid> col_ids;

    // The largest terms, which are those of the least or the greatest similarity.
    Acc top_neg = 0, top_pos = 0;
    if constexpr (Which::kNegExp || Which::kPosExp) {
        constexpr int kKinds = Formula::kPosInNeg ? 1 : 2;  // negatives, positives; or all together
        Acc least[kKinds], greatest[kKinds];
        for (int k = 0; k < kKinds; ++k) {
            least[k] = infinity<Acc>();
            greatest[k] = -infinity<Acc>();
        }
        const auto add = [&](int kind, Acc s) {
            least[kind] = std::fmin(least[kind], s);
            greatest[kind] = std::fmax(greatest[kind], s);
        };
#pragma unroll 1
        for (int i = 0; i < Grid::kRows; ++i) {  // times: 8
            const int id = Grid::ids()[Grid::row(i)];
            const auto sims = Grid::sims(i);
            if (kKinds == 2 && col_ids.any_positive(id)) {  // rare: positives among a warp's 8 x 32 pairs
#pragma unroll
                for (int j = 0; j < Grid::kCols; ++j) {
                    if (col_ids.positive(j, id)) {
                        add(kKinds - 1, sims.s[j]);
                    } else {
                        add(0, sims.s[j]);
                    }
                }
            } else {
#pragma unroll
                for (int j = 0; j < Grid::kCols; ++j) add(0, sims.s[j]);
            }
        }
        const auto top = [&](int kind, Acc* shared, const auto& term) {
            const Acc low = -block_max<Math>(-least[kind], shared);
            const Acc high = block_max<Math>(greatest[kind], shared + kWarpSize);
            return std::fmax(term(low), term(high));
        };
        if constexpr (Which::kNegExp)
            top_neg = top(0, numbers + 3 * kLines, [&](Acc s) { return formula.neg_term(s); });
        if constexpr (Which::kPosExp)
            top_pos =
                top(kKinds - 1, numbers + 4 * kLines, [&](Acc s) { return formula.pos_term(s, Acc(0)); });
    }
    block_sync();

    const Meeting<Grid> meeting = {Grid::scratch(Which::kCount)};
    const PairTerms<Formula, kStage, Acc> terms = {formula, top_neg, top_pos,
                                                   count_zeros ? Acc(1) : kZeroCounts<Acc>};
    const auto gather = [&](auto both) {
        constexpr bool kBoth = decltype(both)::value;
        // Registers hold what negatives need; a rare positive reads the rest where it lies.
        const auto of_col = [&](int number, int j) {
            return numbers[number * kLines + kTile + Grid::col(j)];
        };
        Acc col_below[Grid::kCols], col_above[Grid::kCols];
        Sums of_cols[Grid::kCols];
        if constexpr (kBoth && Which::kNegs) {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                if constexpr (Formula::kPosInNeg) col_below[j] = of_col(0, j);
                col_above[j] = of_col(1, j);
            }
        }
#pragma unroll 1
        for (int i = 0; i < Grid::kRows; ++i) {  // times: 8
            const int at = Grid::row(i), id = Grid::ids()[at];
            const Acc below = numbers[at], above = numbers[kLines + at];
            const Acc context = Which::kContext ? numbers[2 * kLines + at] : Acc(0);
            const auto sims = Grid::sims(i);
            Sums of_row;
            if constexpr (Which::kNegs) {
#pragma unroll
                for (int j = 0; j < Grid::kCols; ++j) {
                    const bool positive = col_ids.positive(j, id);
                    const Acc s = sims.s[j], term = terms.neg_term(s);
                    terms.add_negative(of_row, positive, s, term, below, above);
                    if constexpr (kBoth)
                        terms.add_negative(of_cols[j], positive, s, term, col_below[j], col_above[j]);
                }
            }
            if (Which::kPoss && col_ids.any_positive(id)) {  // rare: positives among a warp's 8 x 32 pairs
#pragma unroll
                for (int j = 0; j < Grid::kCols; ++j) {
                    const bool positive = col_ids.positive(j, id);
                    const Acc s = sims.s[j], term = terms.pos_term(s);
                    terms.add_positive(of_row, positive, s, term, below, context);
                    if constexpr (kBoth) {
                        terms.add_positive(of_cols[j], positive, s, term, of_col(0, j),
                                           Which::kContext ? of_col(2, j) : Acc(0));
                    }
                }
            }
            of_row.each(
                [&](int quantity, Acc x) { meeting.put_row(quantity, i, over_row<Grid>(x, Plus{})); });
        }
        if constexpr (kBoth) {
#pragma unroll
            for (int quantity = 0; quantity < Which::kCount; ++quantity) {
                Acc of_quantity[Grid::kCols];
#pragma unroll
                for (int j = 0; j < Grid::kCols; ++j) {
                    of_cols[j].each([&](int which, Acc x) {
                        if (which == quantity) of_quantity[j] = x;
                    });
                }
                meeting.put_cols(quantity, of_quantity, Plus{});
            }
        }
    };
    if (tile_group.square) {
        gather(std::true_type{});
    } else {
        gather(std::false_type{});
    }
    block_sync();

    if (line >= lines) return false;
    Sums sums;
    sums.each([&](int quantity, Acc& x) { x = meeting.get(quantity, line, Plus{}); });
    Acc q[kQuantities];
    no_quantities<Formula, kStage>(q);
    bool careful = false, any = false;
    const auto take = [&](bool exponentials, int at, Acc top, Acc count, Acc sum) {
        q[at] = !exponentials ? count : sum > Acc(0) ? top : -infinity<Acc>();
        q[at + 1] = sum;
        careful = careful || (exponentials && sum > Acc(0) && sum < kLeastSum<Acc>);
        any = any || (exponentials || Formula::kHinge ? sum != Acc(0) : count > Acc(0));
    };
    if constexpr (Which::kNegs) take(Which::kNegExp, 0, top_neg, sums.neg_count, sums.neg);
    if constexpr (Which::kPoss) take(Which::kPosExp, 2, top_pos, sums.pos_count, sums.pos);
    if constexpr (Which::kContext) q[1] = sums.context;
    if constexpr (Which::kNegExp || Which::kPosExp) {
        if (careful) gather_carefully<Math, kStage>(formula, line, numbers[line], numbers[kLines + line], q);
    }
    const int side = line < kTile ? 0 : 1;
    const int row = int(blockIdx.y), col = int(blockIdx.x);
    const int slot = side == 0 ? col : row, at = side == 0 ? row * kTile + line : (col - 1) * kTile + line;
#pragma unroll
    for (int k = 0; k < kQuantities; ++k) partials.template at<kTile>(tile_group, side, slot, k, at) = q[k];
    return any;
}

// kept: [tiles] bits of what the tile holds, or null. A tile that was skipped leaves no partials.
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(TileTraits<Math>::kThreads, kPairBlocks<Math>)
    accumulate(const __grid_constant__ TileGroup<T, Acc> all,
               const __grid_constant__ AnyFormula<Acc> any_formula, bool second, RowStats<Acc> stats,
               Partials<Acc> partials, const Acc* tile_extremes, uint8_t* kept, bool count_zeros) {
    constexpr int kTile = TileTraits<Math>::kTile;
    const auto tile_group = all.template in_use<kTile>();
    const int64_t ti = tile_group.row_tile + blockIdx.y, tj = tile_group.col_tile + blockIdx.x;
    if (!tile_group.has(ti, tj)) return;
    const int64_t index = tile_group.tile_index(ti, tj);
    const uint8_t before = kept && second ? kept[index] & kHasGradient : 0;
    if ((tile_extremes && !may_keep<Math>(tile_group, ti, tj, stats, tile_extremes, !second)) ||
        (second && kept && !has_positives<Math>(tile_group, ti, tj))) {
        if (threadIdx.x == 0) kept[index] = before;
        return;
    }
    const LoadedTile<Math> tile = load_pairs<Math>(tile_group, ti, tj, false);
    bool any = false;
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        const auto gather = [&](auto stage) {
            any = gather_tile<Math, decltype(stage)::value>(tile_group, tile, ti, tj, formula, stats,
                                                            partials, count_zeros);
        };
        if constexpr (!Formula::kContext) {
            gather(std::integral_constant<Stage, Stage::kBoth>{});
        } else if (!second) {
            gather(std::integral_constant<Stage, Stage::kNegatives>{});
        } else {
            gather(std::integral_constant<Stage, Stage::kPositives>{});
        }
    });
    if (!kept) return;
    any = block_any<Math>(any);
    if (threadIdx.x == 0) kept[index] = before | kHasPartials | (any ? kHasGradient : 0);
}

// ---- merges --------------------------------------------------------------------------------------------

inline constexpr int kMergeThreads = 64;
inline constexpr int kMergeBatch = 8;  // slots that are loaded before the first of them is merged

// The partial results of a merge's thread: thread `line` of side 0 is a row of the tile_group-tile, of side 1
// (only off the diagonal, where both sides are the same points) a column. Calls f(numbers [Count,
// kMergeBatch]) for some slots at a time, in order; numbers are `none` where the tile's kept flag lacks the
// bit. All threads of a warp have one tile of their own, so that they look at the flags of 32 slots together,
// and no number waits for another.
template <int Tile, int Count, typename T, typename Acc, typename F>
DML_DEVICE void for_slots(const TileGroup<T, Acc>& tile_group, const Partials<Acc>& partials, int side,
                          int line, const uint8_t* kept, uint8_t bit, const Acc (&none)[Count], const F& f) {
    static_assert(Tile % kWarpSize == 0 && kWarpSize % kMergeBatch == 0, "as the threads share");
    const int own = line / Tile;
#pragma unroll 1
    for (int part = side; part < (tile_group.diagonal() ? 2 : side + 1); ++part) {  // times: 2
        const bool as_row = part == 0;
        const int slots = as_row ? tile_group.col_tiles : tile_group.row_tiles;
        const int lines = (as_row ? tile_group.row_tiles : tile_group.col_tiles) * Tile;
        const Acc* numbers = &partials.template at<Tile>(tile_group, part, 0, 0, line);
#pragma unroll 1
        for (int first = 0; first < slots; first += kWarpSize) {  // times: 1
            const int slot = first + lane_id();
            const int64_t ti = tile_group.row_tile + (as_row ? own : slot),
                          tj = tile_group.col_tile + (as_row ? slot : own);
            const uint32_t there = warp_ballot(slot < slots && tile_group.has(ti, tj) &&
                                               (!kept || (kept[tile_group.tile_index(ti, tj)] & bit) != 0));
            const int here = slots - first < kWarpSize ? slots - first : kWarpSize;
#pragma unroll 1
            for (int batch = 0; batch < here; batch += kMergeBatch) {  // times: 4
                Acc q[Count][kMergeBatch];
#pragma unroll
                for (int b = 0; b < kMergeBatch; ++b) {
#pragma unroll
                    for (int k = 0; k < Count; ++k) {
                        q[k][b] = none[k];
                        if (there >> (batch + b) & 1u) q[k][b] = numbers[(b * kQuantities + k) * lines];
                    }
                }
                numbers += kMergeBatch * kQuantities * int64_t(lines);
                f(q);
            }
        }
    }
}

// Whether the tile_group-tile has the line of a merge's thread: so has it those of the whole block, or none.
template <int Tile, typename T, typename Acc>
DML_DEVICE bool has_line(const TileGroup<T, Acc>& tile_group, int side, int line) {
    static_assert(Tile % kMergeThreads == 0, "whole blocks");
    return line < (side == 0 ? tile_group.row_tiles : tile_group.col_tiles) * Tile;
}
// The row of a merge's thread, or -1 past the last one. Such a thread merges what is there, with its warp.
template <int Tile, typename T, typename Acc>
DML_DEVICE int64_t merge_row(const TileGroup<T, Acc>& tile_group, int side, int line) {
    const int64_t i = (side == 0 ? tile_group.row_tile : tile_group.col_tile) * Tile + line;
    return i < (side == 0 ? tile_group.rows : tile_group.cols).points.rows ? i : -1;
}

// Which of a side's rows a merge meets for the first time, and for the last.
struct Turn {
    bool rows_first, cols_first;
    bool rows_last;

    DML_DEVICE bool first(int side) const { return side == 0 ? rows_first : cols_first; }
};

template <int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_extremes(const __grid_constant__ TileGroup<T, Acc> all, RowStats<Acc> stats, Partials<Acc> partials,
                   Turn turn, Acc epsilon) {
    const auto tile_group = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kMergeThreads + int(threadIdx.x);
    if (!has_line<Tile>(tile_group, side, line)) return;
    const int64_t i = merge_row<Tile>(tile_group, side, line);
    const RunningRow<Acc> row{stats, i};
    Extremes<Acc> found;
    if (i >= 0 && !turn.first(side)) found = {row.min_pos(), row.max_neg()};
    const Acc none[2] = {infinity<Acc>(), -infinity<Acc>()};
    for_slots<Tile>(tile_group, partials, side, line, nullptr, kHasPartials, none,
                    [&](const Acc(&q)[2][kMergeBatch]) {
#pragma unroll
                        for (int b = 0; b < kMergeBatch; ++b) found.merge({q[0][b], q[1][b]});
                    });
    if (i < 0) return;
    if (turn.rows_last && side == 0) {
        const Bounds<Acc> bounds = found.mined(epsilon);
        stats.flags[i] = found.has_both() ? kEligible : uint8_t(0);
        stats.neg_above[i] = bounds.neg_above;
        stats.pos_below[i] = bounds.pos_below;
    } else {
        row.min_pos() = found.min_pos;
        row.max_neg() = found.max_neg;
    }
}

template <int Tile, Stage kStage, typename Formula, typename T, typename Acc>
DML_DEVICE RowResult<Acc> merge_row_sums(const TileGroup<T, Acc>& tile_group, int side, int line, int64_t i,
                                         const Formula& formula, const RowStats<Acc>& stats,
                                         const Partials<Acc>& partials, const uint8_t* kept, Turn turn,
                                         bool mining, const Results<Acc>& results) {
    const RunningRow<Acc> row{stats, i};
    const bool first = turn.first(side);
    Gathering<Formula, Acc> g;
    if (i >= 0 && !first) g = row.template load<Formula>();
    if (kStage == Stage::kPositives && i >= 0 && first) g.neg = {stats.neg[i], Acc(0)};
    Acc none[kQuantities];
    no_quantities<Formula, kStage>(none);
    if (kStage == Stage::kPositives) none[1] = Acc(0);
    for_slots<Tile>(tile_group, partials, side, line, kept, kHasPartials, none,
                    [&](const Acc(&q)[kQuantities][kMergeBatch]) { g.template merge<kStage>(q); });
    if (i < 0) return {};
    if (!(turn.rows_last && side == 0)) {
        row.store(g);
        return {};
    }
    if constexpr (kStage == Stage::kNegatives) {
        stats.neg[i] = g.neg.value(Formula::kPlusOne);
        return {};
    } else {
        const Bounds<Acc> bounds = {stats.pos_below[i], stats.neg_above[i]};
        return finish_row(stats, i, formula, g, bounds, mining, mining && (stats.flags[i] & kEligible) != 0,
                          tile_group.rows.norms[i], results);
    }
}

template <int Tile, typename T, typename Acc>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_sums(const __grid_constant__ TileGroup<T, Acc> all,
               const __grid_constant__ AnyFormula<Acc> any_formula, bool second, RowStats<Acc> stats,
               Partials<Acc> partials, const uint8_t* kept, Turn turn, bool mining, Results<Acc> results) {
    const auto tile_group = all.template in_use<Tile>();
    const int side = int(blockIdx.y), line = int(blockIdx.x) * kMergeThreads + int(threadIdx.x);
    if (!has_line<Tile>(tile_group, side, line)) return;
    const int64_t i = merge_row<Tile>(tile_group, side, line);
    RowResult<Acc> result;
    bool finished = turn.rows_last && side == 0;
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        const auto merge = [&](auto stage) {
            result = merge_row_sums<Tile, decltype(stage)::value>(tile_group, side, line, i, formula, stats,
                                                                  partials, kept, turn, mining, results);
        };
        if constexpr (!Formula::kContext) {
            merge(std::integral_constant<Stage, Stage::kBoth>{});
        } else if (!second) {
            finished = false;
            merge(std::integral_constant<Stage, Stage::kNegatives>{});
        } else {
            merge(std::integral_constant<Stage, Stage::kPositives>{});
        }
    });
    if (!finished) return;
    // One slot of results for each warp.
    result.part[0] = warp_sum(result.part[0]);
    result.part[1] = warp_sum(result.part[1]);
    result.count[0] = warp_sum(result.count[0]);
    result.count[1] = warp_sum(result.count[1]);
    result.eligible = warp_sum(result.eligible);
    result.not_finite = warp_sum(result.not_finite);
    result.very_long = warp_sum(result.very_long);
    if (lane_id() == 0 && i >= 0) results.store(i / kWarpSize, result);
}

}  // namespace dml::cuda
