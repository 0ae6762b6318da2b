// A formula as a kernel's argument: kernels are compiled once and branch into the formula's loops.
#pragma once

#include <cstring>

#include "core/problem.h"
#include "cuda/common/primitives.cuh"

namespace dml::cuda {

// The formula's number and its struct, built on the host, so that no kernel divides doubles.
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

}  // namespace dml::cuda
