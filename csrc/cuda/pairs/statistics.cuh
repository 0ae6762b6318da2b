// What a row gathers over its kept pairs, from the numbers that tiles leave to its loss, and what backward
// needs of it. One formula at a time: everything here is compiled for a formula and called behind
// AnyFormula::visit.
#pragma once

#include "cuda/pairs/rows.cuh"

namespace dml::cuda {

// A formula with its parameters, as a kernel's argument. Its struct is made on the host, so that no kernel
// divides doubles.
template <typename Acc>
struct AnyFormula {
    FormulaId id;
    alignas(8) unsigned char bytes[8 * 8];

    explicit AnyFormula(const Problem& problem) : id(problem.formula), bytes{} {
        with_formula(id, [&](auto tag) {
            using Formula = typename decltype(tag)::template Of<Acc>;
            static_assert(sizeof(Formula) <= sizeof(bytes), "room for a formula's parameters");
            const Formula formula(problem.params);
            std::memcpy(bytes, &formula, sizeof formula);
        });
    }
    // visit(formula): the one branch, the same for all threads.
    template <typename Visit>
    DML_DEVICE void visit(const Visit& visit) const {
        with_formula(id, [&](auto tag) {
            using Formula = typename decltype(tag)::template Of<Acc>;
            visit(*reinterpret_cast<const Formula*>(bytes));
        });
    }
};

// Formulas whose positives see the value of the negatives' accumulator take two streams over the tiles.
enum class Stage { kBoth, kNegatives, kPositives };

template <typename Formula>
inline constexpr bool kAnyLogSumExp =
    Formula::kNeg == Accumulator::kLogSumExp || Formula::kPos == Accumulator::kLogSumExp;

// The saved statistics: one array for each quantity, so that neighbouring threads read neighbours.
template <typename Acc>
struct RowStats {
    Acc* header;                                             // [kHeader]
    Acc *neg_above, *pos_below, *neg, *pos, *d_neg, *d_pos;  // [rows] each
    uint8_t* flags;                                          // [rows]
};
inline constexpr int kScale = 0;   // [2] the reduction's factor for each part
inline constexpr int kHealth = 2;  // 1; 0 where no gradient is asked for; NaN where inputs are not finite
inline constexpr int kRange = 3;   // a power of two that keeps tiles' weights in range
inline constexpr uint8_t kEligible = 1;  // the labels give the row the pairs that its loss needs

// An accumulator's two running numbers: largest term and sum of exp(term - largest); or count and sum of
// terms.
template <Accumulator kAccumulator, typename Acc>
struct Running {
    Acc a = kAccumulator == Accumulator::kLogSumExp ? -infinity<Acc>() : Acc(0), b = Acc(0);

    // Several at once, so that no exponential waits for another; in their order.
    template <int Count>
    DML_DEVICE void merge(const Acc (&more_a)[Count], const Acc (&more_b)[Count]) {
        if constexpr (kAccumulator == Accumulator::kLogSumExp) {
            Acc top = a;
#pragma unroll
            for (int k = 0; k < Count; ++k) top = more_a[k] > top ? more_a[k] : top;
            const Acc base = top == -infinity<Acc>() ? Acc(0) : top;  // then all are empty
            b *= std::exp(a - base);
#pragma unroll
            for (int k = 0; k < Count; ++k) b += more_b[k] * std::exp(more_a[k] - base);
            a = top;
        } else {
#pragma unroll
            for (int k = 0; k < Count; ++k) {
                a += more_a[k];
                b += more_b[k];
            }
        }
    }
    // Whether any pair was kept: see kZeroCounts.
    DML_DEVICE bool any() const {
        return kAccumulator == Accumulator::kLogSumExp ? a != -infinity<Acc>() : a > Acc(0);
    }
    DML_DEVICE Acc value(bool plus_one) const {
        return kAccumulator == Accumulator::kLogSumExp ? LogSumExp<Acc>{a, b}.value(plus_one) : b;
    }
    DML_DEVICE Acc count() const { return kAccumulator == Accumulator::kSum ? std::floor(a) : Acc(0); }
};

// Where only terms that are not 0 count, the others count this much of a pair: too little to make one of all
// the pairs that a row can have, enough to tell a row that kept something from one that kept nothing.
template <typename Acc>
inline constexpr Acc kZeroCounts = Acc(1) / Acc(int64_t(1) << 40);

// What a row, or one tile's line of it, has gathered. While positives are gathered with a context, neg.a is
// that context and neg.b the sum of the terms' derivatives with respect to it.
template <typename Formula, typename Acc>
struct Gathering {
    Running<Formula::kNeg, Acc> neg;
    Running<Formula::kPos, Acc> pos;

    // q: of several tiles, in their order.
    template <Stage kStage, int Count>
    DML_DEVICE void merge(const Acc (&q)[4][Count]) {
        if constexpr (kStage == Stage::kPositives) {
#pragma unroll
            for (int k = 0; k < Count; ++k) neg.b += q[1][k];
        } else {
            neg.merge(q[0], q[1]);
        }
        if constexpr (kStage != Stage::kNegatives) pos.merge(q[2], q[3]);
    }
};
template <typename Formula, Stage kStage, typename Acc>
DML_DEVICE void no_quantities(Acc (&q)[4]) {
    const Gathering<Formula, Acc> none;
    q[0] = none.neg.a;
    q[1] = none.neg.b;
    q[2] = none.pos.a;
    q[3] = none.pos.b;
}

// Until it is finished a row keeps its running state in the arrays of its final statistics.
template <typename Acc>
struct RunningRow {
    const RowStats<Acc>& stats;
    int64_t i;

    DML_DEVICE Acc& min_pos() const { return stats.neg_above[i]; }
    DML_DEVICE Acc& max_neg() const { return stats.pos_below[i]; }

    template <typename Formula>
    DML_DEVICE Gathering<Formula, Acc> load() const {
        return {{stats.neg[i], stats.d_neg[i]}, {stats.pos[i], stats.d_pos[i]}};
    }
    template <typename Formula>
    DML_DEVICE void store(const Gathering<Formula, Acc>& g) const {
        stats.neg[i] = g.neg.a;
        stats.d_neg[i] = g.neg.b;
        stats.pos[i] = g.pos.a;
        stats.d_pos[i] = g.pos.b;
    }
};

// The least similar positive and the most similar negative.
template <typename Acc>
struct Extremes {
    Acc min_pos = infinity<Acc>(), max_neg = -infinity<Acc>();

    DML_DEVICE void add(bool positive, Acc s) {  // s may be NaN, which std::fmin and fmax pass over
        if (positive) {
            min_pos = std::fmin(min_pos, s);
        } else {
            max_neg = std::fmax(max_neg, s);
        }
    }
    DML_DEVICE void merge(const Extremes& other) {
        min_pos = other.min_pos < min_pos ? other.min_pos : min_pos;
        max_neg = other.max_neg > max_neg ? other.max_neg : max_neg;
    }
    DML_DEVICE bool has_both() const { return min_pos != infinity<Acc>() && max_neg != -infinity<Acc>(); }

    // The mining rule; a row that lacks either kind keeps nothing. Rounding of the two bounds must not keep
    // pairs of one kind only.
    DML_DEVICE Bounds<Acc> mined(Acc epsilon) const {
        const Bounds<Acc> bounds = {max_neg + epsilon, min_pos - epsilon};
        return min_pos < bounds.pos_below && max_neg > bounds.neg_above ? bounds : Bounds<Acc>::none();
    }
};

// What rows add to the result.
template <typename Acc>
struct RowResult {
    Acc part[2] = {Acc(0), Acc(0)}, count[2] = {Acc(0), Acc(0)};
    Acc eligible = Acc(0), not_finite = Acc(0), very_long = Acc(0);  // rows
};
inline constexpr int kResultNumbers = 7;

// Results of some rows each, [kResultNumbers, slots], merged in order by the reduction.
template <typename Acc>
struct Results {
    Acc* data;
    int64_t slots;
    Acc* rows;  // [rows] each row's loss, or null where it is not asked for
    Reduction reduction;

    DML_DEVICE void store(int64_t slot, const RowResult<Acc>& r) const {
        const Acc numbers[kResultNumbers] = {r.part[0],  r.part[1],    r.count[0], r.count[1],
                                             r.eligible, r.not_finite, r.very_long};
#pragma unroll
        for (int k = 0; k < kResultNumbers; ++k) data[k * slots + slot] = numbers[k];
    }
};

// A row is finished from what it gathered. context: the value of the negatives' accumulator, where the
// formula has it already. had_both: so says mining, of the pairs before it; without mining every pair was
// kept, so what is empty the labels did not give.
template <typename Formula, typename Acc>
DML_DEVICE RowResult<Acc> finish_row(const RowStats<Acc>& stats, int64_t i, const Formula& formula,
                                     const Gathering<Formula, Acc>& row, Bounds<Acc> bounds, bool mining,
                                     bool had_both, Acc norm, const Results<Acc>& results) {
    Gathered<Acc> g;
    Acc pos_context = Acc(0);
    bool any_neg = row.neg.any();
    if constexpr (Formula::kContext) {
        g.neg = row.neg.a;
        pos_context = row.neg.b;
        any_neg = g.neg != (Formula::kPlusOne ? Acc(0) : -infinity<Acc>());
    } else {
        g.neg = row.neg.value(Formula::kPlusOne);
        g.neg_count = row.neg.count();
    }
    g.pos = row.pos.value(Formula::kPlusOne);
    g.pos_count = row.pos.count();

    const bool any_pos = row.pos.any(), valid = any_pos || any_neg;
    const bool has_loss = valid && (any_pos || !Formula::kNeedsPos) && (any_neg || !Formula::kNeedsNeg);
    RowDerivatives<Acc> loss = formula.row(g, pos_context);
    if (!has_loss) {
        bounds = Bounds<Acc>::none();
        loss.part[0] = loss.part[1] = loss.d_neg = loss.d_pos = g.neg = g.pos = Acc(0);
    }
    const bool eligible = mining ? had_both : has_loss;
    stats.neg_above[i] = bounds.neg_above;
    stats.pos_below[i] = bounds.pos_below;
    stats.neg[i] = g.neg;
    stats.pos[i] = g.pos;
    stats.d_neg[i] = loss.d_neg;
    stats.d_pos[i] = loss.d_pos;
    stats.flags[i] = eligible ? kEligible : uint8_t(0);
    if (results.rows) results.rows[i] = loss.part[0] + loss.part[1];

    RowResult<Acc> result;
    result.eligible = Acc(eligible);
    result.not_finite = Acc(!is_finite(norm));
    result.very_long = Acc(is_very_long(norm));
#pragma unroll
    for (int k = 0; k < Formula::kParts; ++k) {
        result.part[k] = loss.part[k];
        Acc count = loss.count[k];
        if constexpr (Formula::kCount == Count::kRows) {
            if (results.reduction == Reduction::kMeanNonzero) count = Acc(loss.part[k] != Acc(0));
            if (results.reduction == Reduction::kMeanValid && Formula::kParts == 1) count = Acc(valid);
        }
        result.count[k] = count;
    }
    return result;
}

// The factors of a row's derivatives, of its positives and its negatives: of the reduction and from above.
template <typename Acc>
struct Upstream {
    const Acc* grad;  // [1], [rows] or [parts]
    Reduction reduction;
    bool divide;
    int last_part;

    DML_DEVICE Acc of_part(const RowStats<Acc>& stats, int64_t i, int part) const {
        const int64_t at = reduction == Reduction::kNone ? i : divide ? 0 : part;
        return grad[at] * stats.header[kScale + part];
    }
    DML_DEVICE Acc pos(const RowStats<Acc>& stats, int64_t i) const { return of_part(stats, i, 0); }
    DML_DEVICE Acc neg(const RowStats<Acc>& stats, int64_t i) const { return of_part(stats, i, last_part); }
};

// What all of a gradient is multiplied by besides its weights: 1; or NaN where something is not finite; or 0,
// which also hides what is not finite where nothing asks for its gradient.
template <typename Acc>
DML_DEVICE Acc gradient_factor(const RowStats<Acc>& stats, const Upstream<Acc>& upstream) {
    const Acc health = stats.header[kHealth];
    if (upstream.reduction == Reduction::kNone || health == Acc(0)) return health;
    const Acc first = upstream.pos(stats, 0), last = upstream.neg(stats, 0);
    return is_finite(first) && is_finite(last) ? health : not_a_number<Acc>();
}

// What backward needs of one row.
template <typename Acc>
struct RowWeight {
    Bounds<Acc> bounds = Bounds<Acc>::none();
    Acc neg = 0, pos = 0;      // values of the accumulators
    Acc d_neg = 0, d_pos = 0;  // derivative of the loss with respect to them

    static DML_DEVICE RowWeight load(const RowStats<Acc>& s, int64_t i, const Upstream<Acc>& upstream) {
        RowWeight w;
        w.bounds = {s.pos_below[i], s.neg_above[i]};
        w.neg = s.neg[i];
        w.pos = s.pos[i];
        w.d_neg = s.d_neg[i] * upstream.neg(s, i);
        w.d_pos = s.d_pos[i] * upstream.pos(s, i);
        return w;
    }

    // dL_i/ds; exactly 0 where the pair was not kept.
    template <typename Formula>
    DML_DEVICE Acc of(const Formula& formula, bool positive, Acc s) const {
        if (positive ? !(s < bounds.pos_below) : !(s > bounds.neg_above)) return Acc(0);
        Acc w = 0;
        if (!positive || Formula::kPosInNeg) {
            w = d_neg * formula.neg_derivative(s);
            if constexpr (Formula::kNeg == Accumulator::kLogSumExp) w *= std::exp(formula.neg_term(s) - neg);
        }
        if (positive) {
            const Acc context = Formula::kContext ? neg : Acc(0);
            Acc by_pos = d_pos * formula.pos_derivative(s, context);
            if constexpr (Formula::kPos == Accumulator::kLogSumExp)
                by_pos *= std::exp(formula.pos_term(s, context) - pos);
            w += by_pos;
        }
        return w;
    }
};

// dL/ds of a distance to what multiplies the other row: 1/d of it, and 0 where they are 0.
template <typename Acc>
DML_DEVICE Acc by_distance(Acc weight, Acc s) {
    Acc by;
    if constexpr (sizeof(Acc) == 4) {
        by = __fdividef(weight, -s);  // a distance is no subnormal number
    } else {
        by = weight / -s;
    }
    return s < Acc(0) ? by : Acc(0);
}

}  // namespace dml::cuda
