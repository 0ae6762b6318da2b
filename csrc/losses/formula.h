// What a formula is: a loss as a function of the similarities of one row's kept pairs. The structs beside
// this file each state one; nothing else in csrc knows a formula.
//
// A row gathers its negatives in one fold and its positives in another (folds.h). For each pair the formula
// gives
//
//   neg_term(s)   what joins the fold: a logit of a log-sum-exp, a summand of a sum
//   pos_term(s)   likewise for positives; where the formula declares kContext pos_term(s, ctx), with the
//   value of
//                 the row's negative fold as ctx
//
// and, from both folds, row() gives the loss. Each is a template over the kind of number, T or Dual<T>
// (dual.h), and derivatives.h makes the derivatives of it, as the *gradient* sees them: what a formula wraps
// in constant(..) is held constant. No loop, no tile, no tensor. kParams names the parameters, in the order
// in which the constructor finds them.
//
// Among the pairs of one kind a logit must be largest at their least or their greatest similarity (the CUDA
// kernels look there for the largest).
#pragma once

#include <cmath>
#include <string_view>

#include "core/accumulators.h"
#include "core/numeric.h"
#include "core/portable.h"
#include "losses/dual.h"

namespace dml {

// What the parts of a loss are averaged over: rows, or the kept pairs of the rows.
enum class Unit { kRow, kPair };

// A row's folds. A log-sum-exp is -inf where it is empty (0 with kPlusOne); counts are those of sums only.
template <typename S>
struct Gathered {
    S neg = S(0), pos = S(0);  // values of the folds
    Plain<S> neg_count = 0, pos_count = 0;
};

// What row() makes of them: part[k] / (sum of the rows' unit[k]), summed over k, is the loss, where unit
// counts under reduction "mean". Positives belong to part 0, negatives to the last part.
template <typename S>
struct RowLoss {
    S part[2] = {S(0), S(0)};
    Plain<S> unit[2] = {1, 1};

    RowLoss() = default;
    DML_INLINE RowLoss(S loss) : part{loss, S(0)} {}
    DML_INLINE RowLoss(S loss, Plain<S> units) : part{loss, S(0)}, unit{units, 1} {}
    DML_INLINE RowLoss(S first, Plain<S> first_units, S second, Plain<S> second_units)
        : part{first, second}, unit{first_units, second_units} {}
};

// What most formulas are; a formula overrides what it is not.
struct FormulaDefaults {
    static constexpr Fold kNeg = Fold::kLogSumExp, kPos = Fold::kLogSumExp;
    static constexpr bool kPlusOne = false;   // log-sum-exps are log(1 + sum)
    static constexpr bool kContext = false;   // terms of positives see the value of the negatives' fold
    static constexpr bool kPosInNeg = false;  // kept positives join the negatives' fold too, by neg_term
    static constexpr bool kHinge = false;     // where a summand is 0 its derivative is 0 too
    static constexpr bool kNeedsPos = false;  // a row without positives has no loss
    static constexpr bool kNeedsNeg = false;  // a row without negatives has no loss
    static constexpr Unit kUnit = Unit::kRow;
    static constexpr int kParts = 1;
};

inline constexpr int kMaxParams = 8;

// How many names "a, b, c" holds.
constexpr int count_names(std::string_view names) {
    int count = names.empty() ? 0 : 1;
    for (const char c : names) count += c == ',';
    return count;
}

}  // namespace dml
