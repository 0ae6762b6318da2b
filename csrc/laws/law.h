// What a law is: a loss as a function of the similarities of one row's kept pairs. The structs beside this
// file each state one; nothing else in csrc knows a formula.
//
// A row gathers its negatives in one fold and its positives in another (folds.h). For each pair the law gives
//
//   neg_term(s)        what joins the fold: a logit of a log-sum-exp, a summand of a sum
//   neg_slope(s)       d neg_term / ds, as the *gradient* sees it (a law that holds a weight constant says
//   so) pos_term(s, ctx)   likewise for positives. ctx is the value of the row's negative fold where the law
//   pos_slope(s, ctx)  declares kContext, and 0 elsewhere
//   pos_context(s, ctx)  d pos_term / d ctx; only with kContext
//
// Among the pairs of one kind a logit must be largest at their least or their greatest similarity (the CUDA
// kernels look there for the largest).
//
// and, from both folds, row() gives the loss and its derivatives. No loop, no tile, no tensor.
#pragma once

#include <cmath>

#include "../folds.h"
#include "../numeric.h"
#include "../portable.h"

namespace dml {

// What the parts of a loss are averaged over: rows, or the kept pairs of the rows.
enum class Unit { kRow, kPair };

// A row's folds. A log-sum-exp is -inf where it is empty (0 with kPlusOne); counts are those of sums only.
template <typename T>
struct Gathered {
    T neg = T(0), pos = T(0);  // values of the folds
    T neg_count = T(0), pos_count = T(0);
    T pos_context = T(0);  // sum of pos_context over the positives
};

// part[k] / (sum of the rows' units[k]), summed over k, is the loss. Positives belong to part 0, negatives
// to the last part.
template <typename T>
struct RowLoss {
    T part[2] = {T(0), T(0)};
    T d_neg = T(0), d_pos = T(0);  // of its part, with respect to the values of the folds
    T unit[2] = {T(1), T(1)};      // under reduction "mean"
};

// What most laws are; a law overrides what it is not.
struct LawDefaults {
    static constexpr Fold kNeg = Fold::kLogSumExp, kPos = Fold::kLogSumExp;
    static constexpr bool kPlusOne = false;   // log-sum-exps are log(1 + sum)
    static constexpr bool kContext = false;   // terms of positives see the value of the negatives' fold
    static constexpr bool kPosInNeg = false;  // kept positives join the negatives' fold too, by neg_term
    static constexpr bool kHinge = false;     // where a summand is 0 its slope is 0 too
    static constexpr bool kNeedsPos = false;  // a row without positives has no loss
    static constexpr bool kNeedsNeg = false;  // a row without negatives has no loss
    static constexpr Unit kUnit = Unit::kRow;
    static constexpr int kParts = 1;
};

inline constexpr int kMaxParams = 4;

}  // namespace dml
