// The one choice of an arithmetic, by a task's scalar type and precision.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/pairs/pair_loss.h"

namespace dml::cuda {

// Returns f(kernels), of type Kernels<Math>: Engine or BlockEngine.
template <template <typename> typename Kernels, typename F>
auto with_arithmetic(const Task& task, const F& f) {
    switch (task.problem.scalar) {
        case Scalar::kFloat64:
            return f(Kernels<SimtMath<double>>());
        case Scalar::kFloat16:
            return f(Kernels<HalfMath<__half>>());
        case Scalar::kBFloat16:
            return f(Kernels<HalfMath<__nv_bfloat16>>());
        case Scalar::kFloat32:
            break;
    }
    switch (task.precision) {
        case Precision::kTf32:
            return f(Kernels<ScaledMath<1>>());
        case Precision::kFull:
            break;
    }
    return f(Kernels<ScaledMath<2>>());
}

}  // namespace dml::cuda

// For each arithmetic: the template is instantiated in instantiations/*.cu.
#define DML_EXTERN_ENGINES(Kernels)                   \
    extern template struct Kernels<SimtMath<double>>; \
    extern template struct Kernels<ScaledMath<2>>;    \
    extern template struct Kernels<ScaledMath<1>>;    \
    extern template struct Kernels<HalfMath<__half>>; \
    extern template struct Kernels<HalfMath<__nv_bfloat16>>;
