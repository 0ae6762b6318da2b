// One engine for each arithmetic: sizes, forward and backward. Instantiated in instantiations/*.cu.
#pragma once

#include "cuda/matrix/engine.cuh"
#include "cuda/pairs/aligned_rows.cuh"
#include "cuda/pairs/backward.cuh"
#include "cuda/pairs/forward.cuh"
#include "cuda/pairs/pair_loss.h"

namespace dml::cuda {

template <typename Math>
struct Engine {
    static int64_t saved_bytes(const Task& task, bool save_for_backward);
    static int64_t forward_workspace_bytes(const Task& task);
    static int64_t backward_workspace_bytes(const Task& task);
    static void forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
                        cudaStream_t stream);
    static void backward(const Task& task, bool saved_for_backward, void* saved, const void* grad_loss,
                         void* grad_queries, void* grad_refs, void* workspace, cudaStream_t stream);
};

// Which path a batch takes: the matrix path, or tiles.
template <typename Math>
bool takes_matrix(const Task& task) {
    const Problem& p = task.problem;
    return uses_matrix(p.queries.count, p.refs.count, sizeof(typename Math::Acc), task.tuning.matrix_bytes) !=
           0;
}

template <typename Math>
int64_t Engine<Math>::saved_bytes(const Task& task, bool save_for_backward) {
    const Problem& p = task.problem;
    if (takes_matrix<Math>(task))
        return MatrixSizes<int64_t>(p.queries.count, p.refs.count, p.square, sizeof(typename Math::Acc))
            .bytes;
    return SavedLayout<Math>{task, save_for_backward}.bytes();
}

template <typename Math>
int64_t Engine<Math>::forward_workspace_bytes(const Task& task) {
    return packed_bytes<typename Math::Value>(task.problem) +
           (takes_matrix<Math>(task) ? MatrixEngine<Math>{task}.forward_workspace_bytes()
                                     : TilePolicy<Math>::forward_workspace_bytes(task));
}

template <typename Math>
int64_t Engine<Math>::backward_workspace_bytes(const Task& task) {
    return packed_bytes<typename Math::Value>(task.problem) +
           (takes_matrix<Math>(task) ? MatrixEngine<Math>{task}.backward_workspace_bytes()
                                     : GradientPolicy<Math>::workspace_bytes(task));
}

template <typename Math>
void Engine<Math>::forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
                           cudaStream_t stream) {
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task aligned = with_aligned_rows<typename Math::Value>(task, bytes, stream);
    auto* result = static_cast<typename Math::Acc*>(loss);
    if (takes_matrix<Math>(task)) {
        MatrixEngine<Math>{aligned}.forward(save_for_backward, saved, result, bytes, stream);
        return;
    }
    const SavedLayout<Math> layout = {aligned, save_for_backward};
    const Launcher<Math> launcher = {aligned, layout.arrays(static_cast<unsigned char*>(saved)), stream};
    forward_tiles(launcher, result, bytes);
}

template <typename Math>
void Engine<Math>::backward(const Task& task, bool saved_for_backward, void* saved, const void* grad_loss,
                            void* grad_queries, void* grad_refs, void* workspace, cudaStream_t stream) {
    using T = typename Math::Value;
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task aligned = with_aligned_rows<T>(task, bytes, stream);
    const auto* upstream = static_cast<const typename Math::Acc*>(grad_loss);
    T *queries = static_cast<T*>(grad_queries), *refs = static_cast<T*>(grad_refs);
    if (takes_matrix<Math>(task)) {
        MatrixEngine<Math>{aligned}.backward(saved, upstream, queries, refs, bytes, stream);
        return;
    }
    const SavedLayout<Math> layout = {aligned, saved_for_backward};
    const Launcher<Math> launcher = {aligned, layout.arrays(static_cast<unsigned char*>(saved)), stream};
    if (queries || refs) backward_tiles(launcher, upstream, queries, refs, bytes);
}

}  // namespace dml::cuda
