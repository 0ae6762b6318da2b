// The list of laws. From it come the names that ops take, the number of their parameters, the tables of
// CPU kernels, the switch of the CUDA kernels, and what Python and the emulator know. To add a loss, write
// its struct in laws/ and add one line here. Where a law is compiled on demand (dml_cuda.load_law) the list
// is that law alone.
#pragma once

#include <string_view>

#include "losses/derivatives.h"

#if defined(DML_OWN_LAW)
#include <own_law.h>  // written by dml_cuda.load_law: the law, and DML_LAWS
#else

#include "losses/binomial_deviance.h"
#include "losses/circle.h"
#include "losses/contrastive.h"
#include "losses/lifted_structure.h"
#include "losses/margin_softmax.h"
#include "losses/multi_similarity.h"
#include "losses/nt_xent.h"
#include "losses/proxy_anchor.h"
#include "losses/sup_con.h"

//  X(name of the law in ops, its struct)
#define DML_LAWS(X)                        \
    X(multi_similarity, MultiSimilarity)   \
    X(circle, Circle)                      \
    X(contrastive, Contrastive)            \
    X(binomial_deviance, BinomialDeviance) \
    X(nt_xent, NTXent)                     \
    X(sup_con, SupCon)                     \
    X(lifted_structure, LiftedStructure)   \
    X(margin_softmax, MarginSoftmax)       \
    X(proxy_anchor, ProxyAnchor)

#endif

namespace dml {

enum class LawId : int {
#define DML_ID(name, Struct) name,
    DML_LAWS(DML_ID)
#undef DML_ID
};

// A law as a value, so that a generic lambda can be handed one.
template <template <typename> class Law>
struct LawTag {
    template <typename T>
    using Of = WithSlopes<T, Law<T>>;
};

// visit(LawTag<..>) of the law: one branch, uniform where the law is the same for all.
DML_CALLS_EITHER
template <typename Visit>
DML_INLINE auto with_law(LawId law, const Visit& visit) {
    switch (law) {
#define DML_CASE(name, Struct) \
    case LawId::name:          \
        return visit(LawTag<Struct>{});
        DML_LAWS(DML_CASE)
#undef DML_CASE
    }
    __builtin_unreachable();  // ids come from the list
}

struct LawInfo {
    std::string_view name;
    LawId id;
    int params;
};

inline constexpr LawInfo kLaws[] = {
#define DML_INFO(name, Struct) {#name, LawId::name, count_names(Struct<float>::kParams)},
    DML_LAWS(DML_INFO)
#undef DML_INFO
};

}  // namespace dml
