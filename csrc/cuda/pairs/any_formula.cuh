// A formula as a kernel's argument: kernels are compiled once and branch into the formula's loops.
#pragma once

#include <cstring>

#include "core/problem.h"
#include "cuda/common/primitives.cuh"
#include "cuda/pairs/saved_sizes.h"

namespace dml::cuda {

// A formula whose derivatives by similarity are those by one of its parameters.
template <typename Acc, typename Formula>
struct DerivedByParam : Formula {
    ByParam<Acc, Formula> by_param;

    DML_DEVICE DerivedByParam(const Formula& formula, const ByParam<Acc, Formula>& by)
        : Formula(formula), by_param(by) {}
    DML_DEVICE Acc neg_derivative(Acc s) const { return by_param.neg_term(s); }
    DML_DEVICE Acc pos_derivative(Acc s, Acc ctx) const { return by_param.pos_term(s, ctx); }
};

// The formula's number and its struct, built on the host, so that no kernel divides doubles; or, where
// parameters are on the device, the address at which make_formula has built it, with its derivatives by each.
template <typename Acc>
struct AnyFormula {
    FormulaId id;
    const unsigned char* learned;  // [kFormulaBytes], then [params, kByParamBytes]; or null
    alignas(8) unsigned char bytes[kFormulaBytes];

    explicit AnyFormula(const Problem& problem, const unsigned char* learned_formula = nullptr)
        : id(problem.formula), learned(learned_formula), bytes{} {
        if (learned) return;
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
            const Formula formula = *reinterpret_cast<const Formula*>(learned ? learned : bytes);
            visit(formula);
        });
    }
};

// The derivatives of a formula on the device by parameter k.
template <typename Formula, typename Acc>
DML_DEVICE DerivedByParam<Acc, Formula> derived_by(const unsigned char* learned, const Formula& formula,
                                                   int k) {
    using By = ByParam<Acc, Formula>;
    static_assert(sizeof(By) <= kByParamBytes, "room for a formula of dual numbers");
    return {formula, *reinterpret_cast<const By*>(learned + kFormulaBytes + k * kByParamBytes)};
}

}  // namespace dml::cuda
