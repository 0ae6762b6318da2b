// A formula with its derivatives, as the engines use it, and readable errors for an incomplete one.
#pragma once

#include <type_traits>
#include <utility>

#include "losses/formula.h"
#include "losses/needed_pairs.h"

namespace dml {

// ---- what a formula must have -----------------------------------------------------------------------------

#define DML_HAS(Name, expression)                      \
    template <typename L, typename T, typename = void> \
    struct Name : std::false_type {};                  \
    template <typename L, typename T>                  \
    struct Name<L, T, std::void_t<decltype(expression)>> : std::true_type {};
DML_HAS(NamesParams, std::string_view(static_cast<const char*>(L::kParams)))
DML_HAS(HasNegTerm, (void(std::declval<const L&>().neg_term(std::declval<T>())),
                     std::declval<const L&>().neg_term(std::declval<Dual<T>>())))
DML_HAS(HasPosTerm, (void(std::declval<const L&>().pos_term(std::declval<T>())),
                     std::declval<const L&>().pos_term(std::declval<Dual<T>>())))
DML_HAS(HasPosTermWithContext,
        (void(std::declval<const L&>().pos_term(std::declval<T>(), std::declval<T>())),
         void(std::declval<const L&>().pos_term(std::declval<Dual<T>>(), std::declval<T>())),
         std::declval<const L&>().pos_term(std::declval<T>(), std::declval<Dual<T>>())))
DML_HAS(HasRow, RowLoss<Dual<T>>(std::declval<const L&>().row(std::declval<const Gathered<Dual<T>>&>())))
#undef DML_HAS

template <typename Formula, typename T, bool kNamed = NamesParams<Formula, T>::value>
struct FewParams : std::true_type {};
template <typename Formula, typename T>
struct FewParams<Formula, T, true> : std::bool_constant<count_names(Formula::kParams) <= kMaxParams> {};

// Readable errors for loss authors.
template <typename T, typename Formula>
struct Complete {
    static_assert(
        NamesParams<Formula, T>::value,
        "the formula: lacks its parameters, static constexpr const char* kParams = \"alpha, beta\";");
    static_assert(FewParams<Formula, T>::value, "the formula: kParams names more than 8 parameters");
    static_assert(std::is_constructible_v<Formula, Params<T>>,
                  "the formula: lacks a constructor from its parameters, NAME(Params<T> params)");
    static_assert(HasNegTerm<Formula, T>::value,
                  "the formula: lacks a member template <typename S> S neg_term(S s) const");
    static_assert(Formula::kContext || HasPosTerm<Formula, T>::value,
                  "the formula: lacks a member template <typename S> S pos_term(S s) const");
    static_assert(
        !Formula::kContext || HasPosTermWithContext<Formula, T>::value,
        "the formula: lacks a member template <typename S, typename C> auto pos_term(S s, C ctx) const, "
        "which kContext asks for");
    static_assert(
        HasRow<Formula, T>::value,
        "the formula: lacks a member template <typename S> RowLoss<S> row(const Gathered<S>& g) const");
    static_assert(!Formula::kContext ||
                      (Formula::kParts == 1 && Formula::kPos == Accumulator::kSum && !Formula::kPosInNeg),
                  "the formula: kContext needs kPos = Accumulator::kSum, one part, and no kPosInNeg");
    static_assert(!Formula::kPosInNeg || Formula::kNeg == Accumulator::kLogSumExp,
                  "the formula: kPosInNeg needs kNeg = Accumulator::kLogSumExp");
    static_assert(
        !Formula::kOnlyNegatives ||
            (Formula::kNeg == Accumulator::kSum && Formula::kPos == Accumulator::kSum &&
             Formula::kParts == 1 && !Formula::kContext),
        "the formula: kOnlyNegatives needs kNeg = kPos = Accumulator::kSum, one part, and no kContext");
    static_assert(Formula::kParts == 1 || Formula::kParts == 2, "the formula: kParts must be 1 or 2");
    static_assert(std::is_trivially_copyable_v<Formula> && sizeof(Formula) <= 64,
                  "the formula: must be numbers only, 64 bytes at most: it is copied to the GPU");
    static constexpr bool kYes = true;
};

// ---- derivatives by similarities --------------------------------------------------------------------------

// A row's loss, and its derivatives with respect to the values of the accumulators.
template <typename T>
struct RowDerivatives {
    T part[2] = {T(0), T(0)};
    T d_neg = T(0), d_pos = T(0);  // of the last part by the negatives', of part 0 by the positives'
    T count[2] = {T(1), T(1)};
    bool nonzero[2] = {false, false};  // whether "mean_nonzero" counts the part
};

template <typename T, typename Formula>
struct WithDerivatives : Formula {
    static_assert(Complete<T, Formula>::kYes, "");
    // A constant, as nvcc makes 0 of count_names where it is called in device code: that has no strings.
    static constexpr int kParamCount = count_names(Formula::kParams);

    static DML_INLINE constexpr NeededPairs needed_pairs() {
        return {Formula::kNeedsPos, Formula::kNeedsNeg};
    }

    // Whether "mean_nonzero" counts a loss, or in a loss of pairs a pair's term.
    static DML_INLINE bool is_nonzero(T loss) {
        return Formula::kLogOnePlus ? !vanishes(loss) : loss != T(0);
    }

    DML_INLINE explicit WithDerivatives(const double* params) : Formula(Params<T>{params}) {}

    DML_INLINE T neg_derivative(T s) const { return derivative_of(Formula::neg_term(Dual<T>(s, T(1)))); }
    DML_INLINE T pos_term(T s, T ctx) const { return any_pos_term(s, ctx); }
    DML_INLINE T pos_derivative(T s, T ctx) const {
        return derivative_of(any_pos_term(Dual<T>(s, T(1)), ctx));
    }
    // d pos_term / d ctx.
    DML_INLINE T pos_context(T s, T ctx) const {
        if constexpr (Formula::kContext) return derivative_of(Formula::pos_term(s, Dual<T>(ctx, T(1))));
        return T(0);
    }

    // pos_context: the sum of pos_context(s, ctx) over the row's positives.
    DML_INLINE RowDerivatives<T> row(const Gathered<T>& g, T pos_context) const {
        RowDerivatives<T> result;
        if (!may_have_loss(g)) {
            if (Formula::kCount == Count::kPairs) result.count[0] = result.count[1] = T(0);
            return result;
        }
        const RowLoss<Dual<T>> by_neg = Formula::row(dual(g, T(1), T(0))),
                               by_pos = Formula::row(dual(g, T(0), T(1)));
        result.part[0] = by_neg.part[0].value;
        result.part[1] = by_neg.part[1].value;
        result.count[0] = by_neg.count[0];
        result.count[1] = by_neg.count[1];
        result.d_pos = by_pos.part[0].derivative;
        result.d_neg = by_neg.part[Formula::kParts - 1].derivative;
        if constexpr (Formula::kContext) result.d_neg += result.d_pos * pos_context;
        set_nonzero(g, result);
        return result;
    }

    // False where the values show that no pair was kept: they are -inf, for log-sum-exps of one kind without
    // the 1.
    static DML_INLINE bool may_have_loss(const Gathered<T>& g) {
        return needed_pairs().present(may_have_pos(g), may_have_neg(g));
    }

   private:
    template <typename S, typename C>
    DML_INLINE auto any_pos_term(S s, C ctx) const {
        if constexpr (Formula::kContext) {
            return Formula::pos_term(s, ctx);
        } else {
            return Formula::pos_term(s);
        }
    }
    // From log-sum-exps as they are where 1 + sum is computed in this type.
    DML_INLINE void set_nonzero(const Gathered<T>& g, RowDerivatives<T>& result) const {
        T part[2] = {result.part[0], result.part[1]};
        if constexpr (Formula::kPlusOne) {
            const auto rounded = [](Accumulator accumulator, T value) {
                return accumulator == Accumulator::kLogSumExp && vanishes(value) ? T(0) : value;
            };
            const Gathered<T> as_computed = {rounded(Formula::kNeg, g.neg), rounded(Formula::kPos, g.pos),
                                             g.neg_count, g.pos_count};
            const RowLoss<Dual<T>> loss = Formula::row(dual(as_computed, T(0), T(0)));
            part[0] = loss.part[0].value;
            part[1] = loss.part[1].value;
        }
        result.nonzero[0] = is_nonzero(part[0]);
        result.nonzero[1] = is_nonzero(part[1]);
    }
    static DML_INLINE Gathered<Dual<T>> dual(const Gathered<T>& g, T by_neg, T by_pos) {
        return {Dual<T>(g.neg, by_neg), Dual<T>(g.pos, by_pos), g.neg_count, g.pos_count};
    }
    static DML_INLINE bool may_have_neg(const Gathered<T>& g) {
        constexpr bool kShows =
            Formula::kNeg == Accumulator::kLogSumExp && !Formula::kPlusOne && !Formula::kPosInNeg;
        return !(kShows && is_empty(g.neg));
    }
    static DML_INLINE bool may_have_pos(const Gathered<T>& g) {
        constexpr bool kShows = Formula::kPos == Accumulator::kLogSumExp && !Formula::kPlusOne;
        return !(kShows && is_empty(g.pos));
    }
};

// ---- derivatives by parameters ----------------------------------------------------------------------------

// The template that a formula is an instance of.
template <typename Formula>
struct FormulaTemplate;
template <template <typename> class Formula, typename T>
struct FormulaTemplate<Formula<T>> {
    template <typename Number>
    using Of = Formula<Number>;
};
template <typename T, typename Formula>
struct FormulaTemplate<WithDerivatives<T, Formula>> : FormulaTemplate<Formula> {};

// The derivatives of a pair's term: first by the similarity, then by each parameter. One evaluation gives all of
// them, so they share its exponentials.
template <typename T, typename Formula>
class TermDerivatives {
   public:
    using All = Lanes<T, 1 + count_names(Formula::kParams)>;

    DML_INLINE explicit TermDerivatives(const double* params) : formula_(Params<Number>{params}) {}

    DML_INLINE All neg_term(T s) const { return derivative_of(formula_.neg_term(similarity(s))); }
    // For a constant context: what moves it comes by way of the negatives' accumulator.
    DML_INLINE All pos_term(T s, T ctx) const {
        if constexpr (Formula::kContext) {
            return derivative_of(formula_.pos_term(similarity(s), Number(ctx)));
        } else {
            return derivative_of(formula_.pos_term(similarity(s)));
        }
    }

   private:
    using Number = Dual<T, All>;
    using NumberFormula = typename FormulaTemplate<Formula>::template Of<Number>;

    static DML_INLINE Number similarity(T s) { return {s, All::unit(0)}; }

    NumberFormula formula_;
};

// The derivatives of a formula's functions by one of its parameters.
template <typename T, typename Formula>
class ByParam {
   public:
    DML_INLINE ByParam(const double* params, int k) : formula_(Params<Dual<T>>{params, k}) {}

    DML_INLINE T neg_term(T s) const { return derivative_of(formula_.neg_term(Dual<T>(s))); }
    // For a constant context: what moves it comes by way of the negatives' accumulator.
    DML_INLINE T pos_term(T s, T ctx) const {
        if constexpr (Formula::kContext) {
            return derivative_of(formula_.pos_term(Dual<T>(s), Dual<T>(ctx)));
        } else {
            return derivative_of(formula_.pos_term(Dual<T>(s)));
        }
    }
    // Of the parts of a row's loss, for constant accumulators.
    DML_INLINE void row(const Gathered<T>& g, T part[2]) const {
        const RowLoss<Dual<T>> loss =
            formula_.row(Gathered<Dual<T>>{Dual<T>(g.neg), Dual<T>(g.pos), g.neg_count, g.pos_count});
        for (int p = 0; p < 2; ++p) part[p] = loss.part[p].derivative;
    }

   private:
    using DualFormula = typename FormulaTemplate<Formula>::template Of<Dual<T>>;
    DualFormula formula_;
};

}  // namespace dml
