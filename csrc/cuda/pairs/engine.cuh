// One engine for each arithmetic: sizes, forward, backward, and counting. Instantiated in instantiations/*.cu.
#pragma once

#include "cuda/matrix/engine.cuh"
#include "cuda/pairs/aligned_rows.cuh"
#include "cuda/pairs/backward.cuh"
#include "cuda/pairs/forward.cuh"
#include "cuda/pairs/learned_params.h"
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
    static int64_t count_workspace_bytes(const Task& task);
    static void count_pairs(const Task& task, int64_t* counts, void* workspace, cudaStream_t stream);
};

// Which path a batch takes: the matrix path, or tiles.
template <typename Math>
bool takes_matrix(const Task& task) {
    const Problem& p = task.problem;
    return uses_matrix(p.queries.count, p.refs.count, sizeof(typename Math::Acc), task.tuning.matrix_bytes) !=
           0;
}

// Bytes that a path saves; what parameters that learn need lies behind.
template <typename Math>
int64_t path_bytes(const Task& task, bool save_for_backward) {
    const Problem& p = task.problem;
    if (takes_matrix<Math>(task))
        return MatrixSizes<int64_t>(p.queries.count, p.refs.count, p.square, sizeof(typename Math::Acc))
            .bytes;
    return SavedLayout<Math>{task, save_for_backward}.bytes();
}

template <typename Math>
int64_t Engine<Math>::saved_bytes(const Task& task, bool save_for_backward) {
    return path_bytes<Math>(task, save_for_backward) +
           learned_bytes<int64_t>(task.problem.queries.count, task.learned.count, sizeof(typename Math::Acc));
}

// With aligned rows, which are packed at `bytes` where they are not, and the place of the learned formula.
template <typename Math>
Task prepared_task(const Task& task, bool save_for_backward, void* saved, unsigned char*& bytes,
                   cudaStream_t stream) {
    Task prepared = with_aligned_rows<typename Math::Value>(task, bytes, stream);
    if (task.learned.count > 0)
        prepared.learned.made =
            static_cast<unsigned char*>(saved) + path_bytes<Math>(task, save_for_backward);
    return prepared;
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
           (takes_matrix<Math>(task)
                ? MatrixEngine<Math>{task}.backward_workspace_bytes()
                : GradientPolicy<Math>::workspace_bytes(task) + TilePolicy<Math>::param_bytes(task));
}

template <typename Math>
void Engine<Math>::forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
                           cudaStream_t stream) {
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task aligned = prepared_task<Math>(task, save_for_backward, saved, bytes, stream);
    Learned<typename Math::Acc>::make(aligned, stream);
    const Previous previous = aligned.learned.count > 0 ? Previous::kMayRun : Previous::kHasEnded;
    auto* result = static_cast<typename Math::Acc*>(loss);
    if (takes_matrix<Math>(task)) {
        MatrixEngine<Math>{aligned}.forward(save_for_backward, saved, result, bytes, previous, stream);
        return;
    }
    const SavedLayout<Math> layout = {aligned, save_for_backward};
    const Launcher<Math> launcher = {aligned, layout.arrays(static_cast<unsigned char*>(saved)), stream};
    forward_tiles(launcher, result, bytes, previous);
}

template <typename Math>
void Engine<Math>::backward(const Task& task, bool saved_for_backward, void* saved, const void* grad_loss,
                            void* grad_queries, void* grad_refs, void* workspace, cudaStream_t stream) {
    using T = typename Math::Value;
    auto* bytes = static_cast<unsigned char*>(workspace);
    using Acc = typename Math::Acc;
    const Task aligned = prepared_task<Math>(task, saved_for_backward, saved, bytes, stream);
    const LearnedParams& learned = aligned.learned;
    const auto* upstream = static_cast<const Acc*>(grad_loss);
    T *queries = static_cast<T*>(grad_queries), *refs = static_cast<T*>(grad_refs);
    // A gradient that is wanted has elements, and so launches before that by parameters.
    const Previous previous = queries || refs ? Previous::kMayRun : Previous::kHasEnded;
    if (takes_matrix<Math>(task)) {
        MatrixEngine<Math>{aligned}.backward(saved, upstream, queries, refs, bytes, stream);
        if (learned.gradient) {
            RowStats<Acc> row_stats = {};
            row_stats.header = static_cast<Acc*>(saved);
            Learned<Acc>::reduce(aligned, row_stats, upstream, previous, stream);
        }
        return;
    }
    const SavedLayout<Math> layout = {aligned, saved_for_backward};
    const Launcher<Math> launcher = {aligned, layout.arrays(static_cast<unsigned char*>(saved)), stream};
    if (queries || refs) backward_tiles(launcher, upstream, queries, refs, bytes);
    // The workspace of the gradients is free again.
    if (learned.gradient)
        gradient_by_params(launcher, rows_by_params<Acc>(aligned), upstream, reinterpret_cast<double*>(bytes),
                           previous);
}

template <typename Math>
int64_t Engine<Math>::count_workspace_bytes(const Task& task) {
    return packed_bytes<typename Math::Value>(task.problem) +
           MatrixEngine<Math>{task}.count_workspace_bytes();
}

template <typename Math>
void Engine<Math>::count_pairs(const Task& task, int64_t* counts, void* workspace, cudaStream_t stream) {
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task aligned = with_aligned_rows<typename Math::Value>(task, bytes, stream);
    MatrixEngine<Math>{aligned}.count(counts, bytes, stream);
}

}  // namespace dml::cuda
