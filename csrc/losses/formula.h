// What a formula is: a loss as a function of the similarities of one row's kept pairs. The structs beside
// this file each state one; nothing else in csrc knows a formula.
//
// A row gathers its negatives in one accumulator and its positives in another (core/accumulators.h). For each
// pair the formula gives
//
//   neg_term(s)   what joins the accumulator: a logit of a log-sum-exp, a summand of a sum
//   pos_term(s)   likewise for positives; where the formula declares kContext pos_term(s, ctx), with the
//   value of
//                 the row's negative accumulator as ctx
//
// and, from both accumulators, row() gives the loss. Each is a template over the kind of number, T or Dual<T>
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
enum class Count { kRows, kPairs };

// A row's accumulators. A log-sum-exp is -inf where it is empty (0 with kPlusOne); counts are those of sums
// only.
template <typename S>
struct Gathered {
    S neg = S(0), pos = S(0);  // values of the accumulators
    Plain<S> neg_count = 0, pos_count = 0;
};

// What row() makes of them: part[k] / (sum of the rows' count[k]), summed over k, is the loss, where count
// counts under reduction "mean". Positives belong to part 0, negatives to the last part.
template <typename S>
struct RowLoss {
    S part[2] = {S(0), S(0)};
    Plain<S> count[2] = {1, 1};

    RowLoss() = default;
    DML_INLINE RowLoss(S loss) : part{loss, S(0)} {}
    DML_INLINE RowLoss(S loss, Plain<S> pairs) : part{loss, S(0)}, count{pairs, 1} {}
    DML_INLINE RowLoss(S first, Plain<S> first_count, S second, Plain<S> second_count)
        : part{first, second}, count{first_count, second_count} {}
};

// What most formulas are; a formula overrides what it is not.
struct FormulaDefaults {
    static constexpr Accumulator kNeg = Accumulator::kLogSumExp, kPos = Accumulator::kLogSumExp;
    static constexpr bool kPlusOne = false;  // log-sum-exps are log(1 + sum)
    static constexpr bool kContext = false;  // terms of positives see the value of the negatives' accumulator
    static constexpr bool kPosInNeg =
        false;                             // kept positives join the negatives' accumulator too, by neg_term
    static constexpr bool kHinge = false;  // where a summand is 0 its derivative is 0 too
    static constexpr bool kNeedsPos = false;  // a row without positives has no loss
    static constexpr bool kNeedsNeg = false;  // a row without negatives has no loss
    static constexpr Count kCount = Count::kRows;
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
