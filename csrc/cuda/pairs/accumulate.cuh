// Large batches: what the formula accumulates over the kept pairs of tiles. One pass over the tiles, after
// the one that finds extremes where there is mining; a formula whose positives see the value of the
// negatives' accumulator takes two. Tiles leave partial results for their rows and columns, which are merged
// in a fixed order, so that the result never depends on which thread block came first.
//
// A term does not depend on whose row it is. So log-sum-exps within a tile are relative to one number, the
// tile's largest term, and one exponential a pair serves its row and its column. A line that lies so far
// below that digits would be lost is gathered again by one thread, relative to its own largest term.
#pragma once

#include "cuda/pairs/any_formula.cuh"
#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/tile_need.cuh"
#include "cuda/pairs/tile_pairs.cuh"

namespace dml::cuda {

// Exponentials count at least kLeastExp, to distinguish a line that kept nothing from one far below the
// tile's largest term; where their sum is less than kLeastSum the line is gathered again.
template <typename Acc>
inline constexpr Acc kLeastExp = Acc(sizeof(Acc) == 4 ? 1e-36 : 1e-300);
template <typename Acc>
inline constexpr Acc kLeastSum = Acc(sizeof(Acc) == 4 ? 1e-26 : 1e-270);

// Which quantities the threads of a line add up, for a formula and a stage.
template <typename Formula, Stage kStage>
struct SummedQuantities {
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

// Quantities that the kernel's scratch memory must hold.
inline int most_summed(FormulaId formula) {
    int most = 0;
    with_formula(formula, [&](auto tag) {
        using Formula = typename decltype(tag)::template Of<float>;
        most = Formula::kContext ? std::max(SummedQuantities<Formula, Stage::kNegatives>::kCount,
                                            SummedQuantities<Formula, Stage::kPositives>::kCount)
                                 : SummedQuantities<Formula, Stage::kBoth>::kCount;
    });
    return most;
}

// A line's running sums; those that a formula and stage do not use take no register.
template <typename Formula, Stage kStage, typename Acc>
struct LineSums {
    using Summed = SummedQuantities<Formula, kStage>;
    Acc neg = 0, neg_count = 0, pos = 0, pos_count = 0, context = 0;

    template <typename F>
    DML_DEVICE void for_each(const F& f) {
        if constexpr (Summed::kNegs) f(Summed::kNegSum, neg);
        if constexpr (Summed::kNegCount) f(Summed::kAtNegCount, neg_count);
        if constexpr (Summed::kPoss) f(Summed::kPosSum, pos);
        if constexpr (Summed::kPosCount) f(Summed::kAtPosCount, pos_count);
        if constexpr (Summed::kContext) f(Summed::kAtContext, context);
    }
};

// The terms of pairs, and what they add to a line's sums.
template <typename Formula, Stage kStage, typename Acc>
struct PairTerms {
    using Summed = SummedQuantities<Formula, kStage>;
    using Sums = LineSums<Formula, kStage, Acc>;
    const Formula& formula;
    Acc top_neg, top_pos;  // what exponentials are relative to
    Acc zero_counts;       // how much a term of 0 counts

    static DML_DEVICE Acc at_least(Acc e) { return e > kLeastExp<Acc> ? e : kLeastExp<Acc>; }
    DML_DEVICE Acc counted(Acc term) const { return Formula::is_nonzero(term) ? Acc(1) : zero_counts; }

    DML_DEVICE Acc neg_term(Acc s) const {
        if constexpr (Summed::kNegExp) return at_least(quick_exp(formula.neg_term(s) - top_neg));
        return formula.neg_term(s);
    }
    DML_DEVICE Acc pos_term(Acc s) const {
        if constexpr (Summed::kPosExp) return at_least(quick_exp(formula.pos_term(s, Acc(0)) - top_pos));
        return Formula::kContext ? Acc(0) : formula.pos_term(s, Acc(0));
    }
    // To the negatives' accumulator; term: neg_term(s).
    DML_DEVICE void add_negative(Sums& line, bool positive, Acc s, Acc term, Acc below, Acc above) const {
        const bool keep = Formula::kPosInNeg ? (positive ? s < below : s > above) : !positive && s > above;
        if (!keep) return;
        line.neg += term;
        if constexpr (Summed::kNegCount) line.neg_count += counted(term);
    }
    // To the positives' accumulator; term: pos_term(s).
    DML_DEVICE void add_positive(Sums& line, bool positive, Acc s, Acc term, Acc below, Acc above,
                                 Acc context) const {
        if (!(Formula::kOnlyNegatives ? !positive && s > above : positive && s < below)) return;
        if constexpr (Formula::kContext) term = formula.pos_term(s, context);
        line.pos += term;
        if constexpr (Summed::kPosCount) line.pos_count += counted(term);
        if constexpr (Summed::kContext) line.context += formula.pos_context(s, context);
    }
};

// A line's log-sum-exps again, relative to its own largest terms, by one thread.
template <Stage kStage, typename Formula, typename Acc>
DML_DEVICE void gather_carefully(const Formula& formula, int line, Acc below, Acc above,
                                 Acc (&q)[kQuantities]) {
    using Grid = PairGrid<Acc>;
    using Summed = SummedQuantities<Formula, kStage>;
    constexpr int kTile = Grid::kTile, kPitch = TileTraits<Acc>::kSimPitch;
    const bool is_row = line < kTile;
    const Acc* sims = is_row ? &Grid::sim(line, 0) : &Grid::sim(0, line - kTile);
    const int* crossing_ids = Grid::ids() + (is_row ? kTile : 0);
    const int id = Grid::ids()[line];
    Acc tops[2] = {-infinity<Acc>(), -infinity<Acc>()}, sums[2] = {Acc(0), Acc(0)};
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
        for (int k = 0; k < kTile; ++k) {
            const Acc s = sims[k * (is_row ? 1 : kPitch)];
            const bool positive = crossing_ids[k] == id;
            if (positive ? !(s < below) : !(s > above)) continue;
            const auto add = [&](int kind, Acc z) {
                if (pass == 0) {
                    tops[kind] = z > tops[kind] ? z : tops[kind];
                } else {
                    sums[kind] += std::exp(z - tops[kind]);
                }
            };
            if constexpr (Summed::kNegExp) {
                if (!positive || Formula::kPosInNeg) add(0, formula.neg_term(s));
            }
            if constexpr (Summed::kPosExp) {
                if (positive) add(1, formula.pos_term(s, Acc(0)));
            }
        }
    }
    if constexpr (Summed::kNegExp) {
        q[0] = tops[0];
        q[1] = sums[0];
    }
    if constexpr (Summed::kPosExp) {
        q[2] = tops[1];
        q[3] = sums[1];
    }
}

// ---- a tile for its rows and, where square, its columns, in four steps ----------------------------------

// Shared numbers of each line; the last two are scratch for block_max.
enum LineBound { kLinePosBelow, kLineNegAbove, kLineContext, kNegScratch, kPosScratch };

// 1. Bounds and context of each line; lines without pairs of their own keep nothing.
template <Stage kStage, typename Acc>
DML_DEVICE void load_bounds(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj, int lines,
                            const RowStats<Acc>& row_stats) {
    constexpr int kLines = PairGrid<Acc>::kLines;
    Acc* numbers = PairGrid<Acc>::line_numbers();
    const int line = int(threadIdx.x);
    if (line >= kLines) return;
    const int64_t i = line_of_thread(tile_group, ti, tj);
    const bool used = i >= 0 && line < lines;
    numbers[kLinePosBelow * kLines + line] = used ? row_stats.pos_below[i] : Bounds<Acc>::none().pos_below;
    numbers[kLineNegAbove * kLines + line] = used ? row_stats.neg_above[i] : Bounds<Acc>::none().neg_above;
    if constexpr (kStage == Stage::kPositives)
        numbers[kLineContext * kLines + line] = used ? row_stats.neg[i] : Acc(0);
}

// 2. The tile's largest terms, which are those of the least or the greatest similarity.
template <Stage kStage, typename Formula, typename Acc>
DML_DEVICE void find_largest_terms(const Formula& formula, const ColumnIds<PairGrid<Acc>>& col_ids,
                                   Acc& top_neg, Acc& top_pos) {
    using Grid = PairGrid<Acc>;
    using Summed = SummedQuantities<Formula, kStage>;
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
    for (int i = 0; i < Grid::kRows; ++i) {
        const int id = Grid::ids()[Grid::row(i)];
        const auto sims = Grid::sims(i);
        if (kKinds == 2 && col_ids.any_positive(id)) {
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
    const auto top = [&](int kind, LineBound place, const auto& term) {
        Acc* scratch = Grid::line_numbers() + place * Grid::kLines;
        const Acc low = -block_max(-least[kind], scratch);
        const Acc high = block_max(greatest[kind], scratch + kWarpSize);
        return std::fmax(term(low), term(high));
    };
    if constexpr (Summed::kNegExp) top_neg = top(0, kNegScratch, [&](Acc s) { return formula.neg_term(s); });
    if constexpr (Summed::kPosExp)
        top_pos = top(kKinds - 1, kPosScratch, [&](Acc s) { return formula.pos_term(s, Acc(0)); });
}

// 3. Sums of each line, by all threads. Both: for the columns, too.
template <Stage kStage, bool kBoth, typename Formula, typename Acc>
DML_DEVICE void sum_pairs(const PairTerms<Formula, kStage, Acc>& terms,
                          const ColumnIds<PairGrid<Acc>>& col_ids,
                          const WarpExchange<PairGrid<Acc>>& exchange) {
    using Grid = PairGrid<Acc>;
    using Summed = SummedQuantities<Formula, kStage>;
    using Sums = LineSums<Formula, kStage, Acc>;
    constexpr int kTile = Grid::kTile, kLines = Grid::kLines;
    const Acc* numbers = Grid::line_numbers();
    // Registers hold what negatives need; a rare positive reads the rest from shared memory.
    const auto col_number = [&](LineBound number, int j) {
        return numbers[number * kLines + kTile + Grid::col(j)];
    };
    Acc col_below[Grid::kCols], col_above[Grid::kCols];
    Sums col_sums[Grid::kCols];
    if constexpr (kBoth && Summed::kNegs) {
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j) {
            if constexpr (Formula::kPosInNeg) col_below[j] = col_number(kLinePosBelow, j);
            col_above[j] = col_number(kLineNegAbove, j);
        }
    }
#pragma unroll 1
    for (int i = 0; i < Grid::kRows; ++i) {
        const int at = Grid::row(i), id = Grid::ids()[at];
        const Acc below = numbers[kLinePosBelow * kLines + at], above = numbers[kLineNegAbove * kLines + at];
        const Acc context = Summed::kContext ? numbers[kLineContext * kLines + at] : Acc(0);
        const auto sims = Grid::sims(i);
        Sums row_sums;
        if constexpr (Summed::kNegs) {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                const bool positive = col_ids.positive(j, id);
                const Acc s = sims.s[j], term = terms.neg_term(s);
                terms.add_negative(row_sums, positive, s, term, below, above);
                if constexpr (kBoth)
                    terms.add_negative(col_sums[j], positive, s, term, col_below[j], col_above[j]);
            }
        }
        if (Summed::kPoss && (Formula::kOnlyNegatives || col_ids.any_positive(id))) {
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                const bool positive = col_ids.positive(j, id);
                const Acc s = sims.s[j], term = terms.pos_term(s);
                terms.add_positive(row_sums, positive, s, term, below, above, context);
                if constexpr (kBoth) {
                    terms.add_positive(col_sums[j], positive, s, term, col_number(kLinePosBelow, j),
                                       col_above[j], Summed::kContext ? col_number(kLineContext, j) : Acc(0));
                }
            }
        }
        row_sums.for_each(
            [&](int quantity, Acc x) { exchange.put_row(quantity, i, merge_lanes<Grid>(x, Plus{})); });
    }
    if constexpr (kBoth) {
#pragma unroll
        for (int quantity = 0; quantity < Summed::kCount; ++quantity) {
            Acc sums[Grid::kCols];
#pragma unroll
            for (int j = 0; j < Grid::kCols; ++j) {
                col_sums[j].for_each([&](int which, Acc x) {
                    if (which == quantity) sums[j] = x;
                });
            }
            exchange.put_cols(quantity, sums, Plus{});
        }
    }
}

// 4. The quantities of this thread's line. Returns whether a derivative of the line can be not 0.
template <Stage kStage, typename Formula, typename Acc>
DML_DEVICE bool line_quantities(const Formula& formula, int line, Acc top_neg, Acc top_pos,
                                const WarpExchange<PairGrid<Acc>>& exchange, Acc (&q)[kQuantities]) {
    using Summed = SummedQuantities<Formula, kStage>;
    constexpr int kLines = PairGrid<Acc>::kLines;
    LineSums<Formula, kStage, Acc> sums;
    sums.for_each([&](int quantity, Acc& x) { x = exchange.get(quantity, line, Plus{}); });
    no_quantities<Formula, kStage>(q);
    bool careful = false, any = false;
    const auto set = [&](bool exponentials, int at, Acc top, Acc count, Acc sum) {
        q[at] = !exponentials ? count : sum > Acc(0) ? top : -infinity<Acc>();
        q[at + 1] = sum;
        careful = careful || (exponentials && sum > Acc(0) && sum < kLeastSum<Acc>);
        any = any || (exponentials || Formula::kHinge ? sum != Acc(0) : count > Acc(0));
    };
    if constexpr (Summed::kNegs) set(Summed::kNegExp, 0, top_neg, sums.neg_count, sums.neg);
    if constexpr (Summed::kPoss) set(Summed::kPosExp, 2, top_pos, sums.pos_count, sums.pos);
    if constexpr (Summed::kContext) q[1] = sums.context;
    if constexpr (Summed::kNegExp || Summed::kPosExp) {
        const Acc* numbers = PairGrid<Acc>::line_numbers();
        if (careful)
            gather_carefully<kStage>(formula, line, numbers[kLinePosBelow * kLines + line],
                                     numbers[kLineNegAbove * kLines + line], q);
    }
    return any;
}

// Returns whether this thread's line found a derivative that can be not 0.
template <Stage kStage, typename Formula, typename Acc>
DML_DEVICE bool gather_tile(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj, const Formula& formula,
                            const RowStats<Acc>& row_stats, const Partials<Acc>& partials, bool count_zeros) {
    using Grid = PairGrid<Acc>;
    using Summed = SummedQuantities<Formula, kStage>;
    constexpr int kTile = Grid::kTile;
    const int line = int(threadIdx.x), lines = tile_group.square ? Grid::kLines : kTile;

    load_bounds<kStage>(tile_group, ti, tj, lines, row_stats);
    const ColumnIds<Grid> col_ids;
    Acc top_neg = 0, top_pos = 0;
    if constexpr (Summed::kNegExp || Summed::kPosExp)
        find_largest_terms<kStage>(formula, col_ids, top_neg, top_pos);
    block_sync();

    const WarpExchange<Grid> exchange = {Grid::scratch(Summed::kCount)};
    const PairTerms<Formula, kStage, Acc> terms = {formula, top_neg, top_pos,
                                                   count_zeros ? Acc(1) : kZeroCounts<Acc>};
    if (tile_group.square) {
        sum_pairs<kStage, true>(terms, col_ids, exchange);
    } else {
        sum_pairs<kStage, false>(terms, col_ids, exchange);
    }
    block_sync();

    if (line >= lines) return false;
    Acc q[kQuantities];
    const bool any = line_quantities<kStage>(formula, line, top_neg, top_pos, exchange, q);
    const int side = line < kTile ? 0 : 1;
    const int row = int(blockIdx.y), col = int(blockIdx.x);
    const int slot = side == 0 ? col : row, at = side == 0 ? row * kTile + line : (col - 1) * kTile + line;
#pragma unroll
    for (int k = 0; k < kQuantities; ++k) partials.at(tile_group, side, slot, k, at) = q[k];
    return any;
}

// ---- the kernel -----------------------------------------------------------------------------------------

// kept: [tiles] flags, or null. A tile that is not needed leaves no partial results.
template <typename Acc>
__global__ void __launch_bounds__(kTileThreads, kPairBlocks<Acc>)
    accumulate(const __grid_constant__ TileGroup<Acc> all,
               const __grid_constant__ AnyFormula<Acc> any_formula, bool second,
               const __grid_constant__ TileNeed<Acc> need, Partials<Acc> partials, uint8_t* kept,
               bool count_zeros) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Traits = TileTraits<Acc>;
    const auto tile_group = all.in_use();
    const int64_t ti = tile_group.row_tile + blockIdx.y, tj = tile_group.col_tile + blockIdx.x;
    if (!tile_group.has(ti, tj)) return;
    const int64_t index = tile_group.tile_index(ti, tj);
    const uint8_t before = kept && second ? kept[index] & kHasGradient : 0;
    if (!need.of(tile_group, ti, tj, Traits::labels(), Traits::flags())) {
        if (threadIdx.x == 0) kept[index] = before;
        return;
    }
    load_pairs(tile_group, ti, tj, false);
    bool any = false;
    any_formula.visit([&](const auto& formula) {
        using Formula = std::decay_t<decltype(formula)>;
        const auto gather = [&](auto stage) {
            any = gather_tile<decltype(stage)::value>(tile_group, ti, tj, formula, need.row_stats, partials,
                                                      count_zeros);
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
    any = block_any<Acc>(any);
    if (threadIdx.x == 0) kept[index] = before | kHasPartials | (any ? kHasGradient : 0);
}

}  // namespace dml::cuda
