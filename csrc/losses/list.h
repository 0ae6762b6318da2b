// The list of formulas. The ops' names, parameter counts, CPU kernel tables, the switch of the CUDA kernels,
// and the lists of Python and the emulator follow from it. To add a loss, write its struct in losses/ and add
// one line here. A library made by dml_cuda.compile_loss has that one formula as its list.
#pragma once

#include <string_view>

#include "losses/derivatives.h"

#if defined(DML_CUSTOM_FORMULA)
#include <custom_formula.h>  // written by dml_cuda.compile_loss: the formula, and DML_FORMULAS
#else

#include "losses/binomial_deviance.h"
#include "losses/circle.h"
#include "losses/contrastive.h"
#include "losses/lifted_structure.h"
#include "losses/margin_softmax.h"
#include "losses/multi_similarity.h"
#include "losses/nca.h"
#include "losses/negatives_lse.h"
#include "losses/nt_xent.h"
#include "losses/proxy_anchor.h"
#include "losses/ranked_list.h"
#include "losses/siglip.h"
#include "losses/sup_con.h"
#include "losses/tuplet_margin.h"

//  X(name of the formula in ops, its struct)
#define DML_FORMULAS(X)                    \
    X(multi_similarity, MultiSimilarity)   \
    X(circle, Circle)                      \
    X(contrastive, Contrastive)            \
    X(binomial_deviance, BinomialDeviance) \
    X(nt_xent, NTXent)                     \
    X(sup_con, SupCon)                     \
    X(lifted_structure, LiftedStructure)   \
    X(nca, NCA)                            \
    X(tuplet_margin, TupletMargin)         \
    X(ranked_list, RankedList)             \
    X(margin_softmax, MarginSoftmax)       \
    X(proxy_anchor, ProxyAnchor)           \
    X(siglip, SigLIP)                      \
    X(negatives_lse, NegativesLSE)

#endif

namespace dml {

enum class FormulaId : int {
#define DML_ID(name, Struct) name,
    DML_FORMULAS(DML_ID)
#undef DML_ID
};

// A formula as a value, the argument of a generic lambda.
template <template <typename> class Formula>
struct FormulaTag {
    template <typename T>
    using Of = WithDerivatives<T, Formula<T>>;
};

// Whether this compiler compiles the formula: nvcc, those that are on CUDA.
template <template <typename> class Formula>
#if defined(__CUDACC__)
inline constexpr bool kIsCompiled = Formula<float>::kOnCuda;
#else
inline constexpr bool kIsCompiled = true;
#endif

// visit(FormulaTag<..>) for the formula: one branch.
DML_CALLS_EITHER
template <typename Visit>
DML_INLINE auto with_formula(FormulaId formula, const Visit& visit) {
    switch (formula) {
#define DML_CASE(name, Struct)                  \
    case FormulaId::name:                       \
        if constexpr (kIsCompiled<Struct>)      \
            return visit(FormulaTag<Struct>{}); \
        else                                    \
            break;
        DML_FORMULAS(DML_CASE)
#undef DML_CASE
    }
    __builtin_unreachable();  // ids come from the list
}

struct FormulaInfo {
    std::string_view name;
    FormulaId id;
    int params;
    bool on_cuda = true;
};

inline constexpr FormulaInfo kFormulas[] = {
#define DML_INFO(name, Struct) \
    {#name, FormulaId::name, count_names(Struct<float>::kParams), Struct<float>::kOnCuda},
    DML_FORMULAS(DML_INFO)
#undef DML_INFO
};

}  // namespace dml
