// A law with its derivatives, as the engines use it.
#pragma once

#include <type_traits>
#include <utility>

#include "losses/formula.h"

namespace dml {

// ---- what a law must have ---------------------------------------------------------------------------------

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

template <typename Law, typename T, bool kNamed = NamesParams<Law, T>::value>
struct FewParams : std::true_type {};
template <typename Law, typename T>
struct FewParams<Law, T, true> : std::bool_constant<count_names(Law::kParams) <= kMaxParams> {};

// Told in words, for who writes one.
template <typename T, typename Law>
struct Complete {
    static_assert(NamesParams<Law, T>::value,
                  "the law: lacks its parameters, static constexpr const char* kParams = \"alpha, beta\";");
    static_assert(FewParams<Law, T>::value, "the law: kParams names more than 8 parameters");
    static_assert(std::is_constructible_v<Law, const double*>,
                  "the law: lacks a constructor from its parameters, NAME(const double* params)");
    static_assert(HasNegTerm<Law, T>::value,
                  "the law: lacks a member template <typename S> S neg_term(S s) const");
    static_assert(Law::kContext || HasPosTerm<Law, T>::value,
                  "the law: lacks a member template <typename S> S pos_term(S s) const");
    static_assert(
        !Law::kContext || HasPosTermWithContext<Law, T>::value,
        "the law: lacks a member template <typename S, typename C> auto pos_term(S s, C ctx) const, "
        "which kContext asks for");
    static_assert(HasRow<Law, T>::value,
                  "the law: lacks a member template <typename S> RowLoss<S> row(const Gathered<S>& g) const");
    static_assert(!Law::kContext || (Law::kParts == 1 && Law::kPos == Fold::kSum && !Law::kPosInNeg),
                  "the law: kContext needs kPos = Fold::kSum, one part, and no kPosInNeg");
    static_assert(!Law::kPosInNeg || Law::kNeg == Fold::kLogSumExp,
                  "the law: kPosInNeg needs kNeg = Fold::kLogSumExp");
    static_assert(Law::kParts == 1 || Law::kParts == 2, "the law: kParts must be 1 or 2");
    static_assert(std::is_trivially_copyable_v<Law> && sizeof(Law) <= 64,
                  "the law: must be numbers only, 64 bytes at most: it is copied to the GPU");
    static constexpr bool kYes = true;
};

// ---- derivatives ------------------------------------------------------------------------------------------

// A row's loss and its derivatives.
template <typename T>
struct RowSlopes {
    T part[2] = {T(0), T(0)};
    T d_neg = T(0), d_pos = T(0);  // of its part, with respect to the values of the folds
    T unit[2] = {T(1), T(1)};
};

template <typename T, typename Law>
struct WithSlopes : Law {
    static_assert(Complete<T, Law>::kYes, "");

    DML_INLINE explicit WithSlopes(const double* params) : Law(params) {}

    DML_INLINE T neg_slope(T s) const { return slope_of(Law::neg_term(Dual<T>(s, T(1)))); }
    DML_INLINE T pos_term(T s, T ctx) const { return any_pos_term(s, ctx); }
    DML_INLINE T pos_slope(T s, T ctx) const { return slope_of(any_pos_term(Dual<T>(s, T(1)), ctx)); }
    // d pos_term / d ctx.
    DML_INLINE T pos_context(T s, T ctx) const {
        if constexpr (Law::kContext) return slope_of(Law::pos_term(s, Dual<T>(ctx, T(1))));
        return T(0);
    }

    // pos_context: its sum over the row's positives.
    DML_INLINE RowSlopes<T> row(const Gathered<T>& g, T pos_context) const {
        RowSlopes<T> result;
        if (lacks(g)) {
            if (Law::kUnit == Unit::kPair) result.unit[0] = result.unit[1] = T(0);
            return result;
        }
        const RowLoss<Dual<T>> by_neg = Law::row(dual(g, T(1), T(0))), by_pos = Law::row(dual(g, T(0), T(1)));
        result.part[0] = by_neg.part[0].value;
        result.part[1] = by_neg.part[1].value;
        result.unit[0] = by_neg.unit[0];
        result.unit[1] = by_neg.unit[1];
        result.d_pos = by_pos.part[0].slope;
        result.d_neg = by_neg.part[Law::kParts - 1].slope;
        if constexpr (Law::kContext) result.d_neg += result.d_pos * pos_context;
        return result;
    }

   private:
    template <typename S, typename C>
    DML_INLINE auto any_pos_term(S s, C ctx) const {
        if constexpr (Law::kContext) {
            return Law::pos_term(s, ctx);
        } else {
            return Law::pos_term(s);
        }
    }
    static DML_INLINE Gathered<Dual<T>> dual(const Gathered<T>& g, T by_neg, T by_pos) {
        return {Dual<T>(g.neg, by_neg), Dual<T>(g.pos, by_pos), g.neg_count, g.pos_count};
    }
    // Whether a pair is missing without which the law has no loss, as far as a log-sum-exp tells.
    static DML_INLINE bool lacks(const Gathered<T>& g) {
        constexpr bool kNegTells = Law::kNeg == Fold::kLogSumExp && !Law::kPlusOne && !Law::kPosInNeg;
        constexpr bool kPosTells = Law::kPos == Fold::kLogSumExp && !Law::kPlusOne;
        return (Law::kNeedsNeg && kNegTells && is_empty(g.neg)) ||
               (Law::kNeedsPos && kPosTells && is_empty(g.pos));
    }
};

}  // namespace dml
