// How to write a loss: the loss of one row as a formula of the similarities of its kept pairs.
//
// Each file beside this one is an example; start from multi_similarity.h. Nothing else in csrc knows a loss:
// the engines choose the pairs (labels, mining), compute similarities, and call the formula.
//
// A row gathers the terms of its negatives in one accumulator and those of its positives in another:
//
//   Accumulator::kLogSumExp   log sum exp(term), or log(1 + sum exp(term)) with kPlusOne
//   Accumulator::kSum         sum of terms, and a count
//
// A formula is a struct template over the scalar type T. It derives from FormulaDefaults and has
//
//   kParams                   "alpha, beta": the parameters' names, in the constructor's order
//   Name(Params<T>)           the constructor from the parameters
//   neg_term(s)               the term of a negative with similarity s
//   pos_term(s)               the term of a positive with similarity s
//   pos_term(s, ctx)          the same with kContext, where ctx is the value of the row's negative
//                             accumulator
//   row(gathered)             the loss of the row, from the values of both accumulators
//
// Each function is a template over the type of number, T or Dual<T> (dual.h). derivatives.h calls it with
// dual numbers, so a formula states no derivative; constant(x) marks what the gradient treats as constant.
// For the derivatives by a parameter that learns, T itself is a type of dual numbers.
// Use the functions of core/numeric.h (exp_fast, log, pow, abs, sqrt, softplus, relu) and rounded_product for
// the product in a logit.
//
// Among the pairs of one kind, the largest logit must be at the smallest or at the largest similarity: the
// CUDA kernels look only there for the maximum.
#pragma once

#include <cmath>
#include <string_view>

#include "core/accumulators.h"
#include "core/numeric.h"
#include "core/portable.h"
#include "losses/dual.h"
#include "losses/params.h"

namespace dml {

// What reduction "mean" divides a part of the loss by: the number of rows, of rows that have a loss (see
// needed_pairs.h), or of kept pairs.
enum class Count { kRows, kRowsWithLoss, kPairs };

// What row() gets. The value of an empty log-sum-exp is -inf (0 with kPlusOne): is_empty(x) tests for it. The
// counts are those of sums, else 0.
template <typename S>
struct Gathered {
    S neg = S(0), pos = S(0);  // values of the accumulators
    Plain<S> neg_count = 0, pos_count = 0;
};

// What row() returns: one part, or two with kParts = 2. The loss of the batch is the sum over parts of
// (sum over rows of part[k]) / (sum over rows of count[k]). Positives may only enter part 0, negatives only
// the last part.
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

// What a formula declares. Override what differs.
struct FormulaDefaults {
    static constexpr Accumulator kNeg = Accumulator::kLogSumExp, kPos = Accumulator::kLogSumExp;

    // Both log-sum-exps are log(1 + sum).
    static constexpr bool kPlusOne = false;

    // pos_term sees the value of the negatives' accumulator. Needs kPos = kSum, one part, no kPosInNeg.
    static constexpr bool kContext = false;

    // Positives also join the negatives' accumulator, with neg_term. Needs kNeg = kLogSumExp.
    static constexpr bool kPosInNeg = false;

    // Both accumulators gather negatives, of neg_term and of pos_term, and positives count for nothing. Needs
    // kNeg = kPos = kSum, one part, no kContext.
    static constexpr bool kOnlyNegatives = false;

    // Where a summand is 0, so is its derivative: backward skips tiles of such pairs.
    static constexpr bool kHinge = false;

    // The loss (of a pair, or of a row) is log(1 + x). "mean_nonzero" counts it as 0 where 1 + x is 1 in the type,
    // as the implementations that compute it so do. Log-sum-exps with kPlusOne are counted likewise without it.
    static constexpr bool kLogOnePlus = false;
    static constexpr bool kOnCuda = true;  // whether the CUDA engine has it

    // A row without positives, without negatives, has no loss.
    static constexpr bool kNeedsPos = false, kNeedsNeg = false;

    static constexpr Count kCount = Count::kRows;
    static constexpr int kParts = 1;
};

// The number of names in "a, b, c".
constexpr int count_names(std::string_view names) {
    int count = names.empty() ? 0 : 1;
    for (const char c : names) count += c == ',';
    return count;
}

}  // namespace dml
