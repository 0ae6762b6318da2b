// The bodies of tile_kernels.h, and the table of them. avx512.cpp, avx2.cpp and baseline.cpp each include
// this file once, after they told the compiler the instruction set: DML_ISA names the namespace, so that no
// two sets share a function, and DML_VECTOR_BYTES is the width of a register. So the *_impl.h files have
// no include guards.
// clang-format off: in the order in which they use each other.
#include "cpu/kernels/vector_impl.h"
#include "cpu/kernels/distances_impl.h"
#include "cpu/kernels/tile_pairs_impl.h"
#include "cpu/kernels/log_sum_exp_impl.h"
#include "cpu/kernels/sum_impl.h"
#include "cpu/kernels/accumulate_impl.h"
#include "cpu/kernels/param_sums_impl.h"
#include "cpu/kernels/weights_impl.h"
#include "cpu/kernels/sparse_tile_impl.h"
// clang-format on

namespace dml::cpu::DML_ISA {

// ---- a formula as functions -------------------------------------------------------------------------------

template <typename T, typename Formula>
RowDerivatives<T> row(const double* params, const Gathered<T>& gathered, T pos_context) {
    return Formula(params).row(gathered, pos_context);
}

template <typename T, typename Formula>
void row_by_params(const double* params, const Gathered<T>& gathered, const T upstream[2],
                   double* by_params) {
    if (!Formula::may_have_loss(gathered)) return;
    for (int k = 0; k < Formula::kParamCount; ++k) {
        T part[2];
        ByParam<T, Formula>(params, k).row(gathered, part);
        for (int p = 0; p < Formula::kParts; ++p) by_params[k] += double(upstream[p]) * double(part[p]);
    }
}

template <typename T, typename Formula>
void terms(const double* params, bool positives, int64_t n, const T* s, const T* context, T* term,
           T* derivative, T* by_context) {
    const Formula formula(params);
    if (positives) {
        for (int64_t k = 0; k < n; ++k) {
            term[k] = formula.pos_term(s[k], context[k]);
            derivative[k] = formula.pos_derivative(s[k], context[k]);
            by_context[k] = formula.pos_context(s[k], context[k]);
        }
        return;
    }
    for (int64_t k = 0; k < n; ++k) {
        term[k] = formula.neg_term(s[k]);
        derivative[k] = formula.neg_derivative(s[k]);
        by_context[k] = T(0);
    }
}

// ---- the table --------------------------------------------------------------------------------------------

template <typename T, typename Formula>
TileKernels<T> make_kernels() {
    return {distances<T>,
            min_positives<T>,
            accumulate<T, Formula>,
            merge<T>,
            weights<T, Formula>,
            row<T, Formula>,
            row_by_params<T, Formula>,
            terms<T, Formula>,
            compress<T>,
            add_product<T>,
            Formula::kNeg,
            Formula::kPos,
            Formula::kPlusOne,
            Formula::kContext,
            Formula::kPosInNeg,
            Formula::kOnlyNegatives,
            Formula::kHinge,
            Formula::kLogOnePlus,
            Formula::needed_pairs(),
            Formula::kCount,
            Formula::kParts};
}

template <typename T>
const TileKernels<T>& kernels(FormulaId formula) {
    static const TileKernels<T> tables[] = {
#define DML_TABLE(name, Struct) make_kernels<T, WithDerivatives<T, Struct<T>>>(),
        DML_FORMULAS(DML_TABLE)
#undef DML_TABLE
    };
    return tables[static_cast<int>(formula)];
}

template const TileKernels<float>& kernels<float>(FormulaId);
template const TileKernels<double>& kernels<double>(FormulaId);

}  // namespace dml::cpu::DML_ISA
