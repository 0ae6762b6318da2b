// Chooses the kernels for a problem's type.
#include "engine.cuh"
#include "pair_loss.h"

namespace dml::cuda {

extern template struct Engine<SimtMath<double>>;
extern template struct Engine<SimtMath<float>>;
extern template struct Engine<Tf32Math<float, true>>;
extern template struct Engine<Tf32Math<float, false>>;
extern template struct Engine<Bf16Math>;
extern template struct Engine<HalfMath<__half>>;
extern template struct Engine<HalfMath<__nv_bfloat16>>;

namespace {

template <typename F>
void with_math(const Problem& problem, const F& f) {
    switch (problem.scalar) {
        case Scalar::kFloat64:
            return f(Engine<SimtMath<double>>());
        case Scalar::kFloat16:
            return f(Engine<HalfMath<__half>>());
        case Scalar::kBFloat16:
            return f(Engine<HalfMath<__nv_bfloat16>>());
        case Scalar::kFloat32:
            break;
    }
    switch (problem.precision) {
        case Precision::kFull:
            return f(Engine<Tf32Math<float, true>>());
        case Precision::kTf32:
            return f(Engine<Tf32Math<float, false>>());
        case Precision::kBf16:
            return f(Engine<Bf16Math>());
        case Precision::kPlain:
            return f(Engine<SimtMath<float>>());
    }
}

}  // namespace

SavedSizes saved_sizes(const Problem& problem, bool save_for_backward) {
    SavedSizes sizes = {};
    with_math(problem, [&](auto engine) { sizes = engine.saved_sizes(problem, save_for_backward); });
    return sizes;
}

int64_t forward_workspace_bytes(const Problem& problem) {
    int64_t bytes = 0;
    with_math(problem, [&](auto engine) { bytes = engine.forward_workspace_bytes(problem); });
    return bytes;
}

int64_t backward_workspace_bytes(const Problem& problem) {
    int64_t bytes = 0;
    with_math(problem, [&](auto engine) { bytes = engine.backward_workspace_bytes(problem); });
    return bytes;
}

void forward(const Problem& problem, const Mining& mining, const Saved& saved, void* loss, void* workspace,
             cudaStream_t stream) {
    with_math(problem, [&](auto engine) { engine.forward(problem, mining, saved, loss, workspace, stream); });
}

void backward(const Problem& problem, const Saved& saved, const void* grad_loss, void* grad_queries,
              void* grad_refs, void* workspace, cudaStream_t stream) {
    with_math(problem, [&](auto engine) {
        engine.backward(problem, saved, grad_loss, grad_queries, grad_refs, workspace, stream);
    });
}

}  // namespace dml::cuda
