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
    static int64_t saved_bytes(const Task& task);
    static int64_t forward_workspace_bytes(const Task& task);
    static int64_t backward_workspace_bytes(const Task& task);
    static void forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
                        cudaStream_t stream);
    static void backward(const Task& task, void* saved, const void* grad_loss, void* grad_queries,
                         void* grad_refs, void* workspace, cudaStream_t stream);
    static int64_t count_workspace_bytes(const Task& task);
    static void count_pairs(const Task& task, int64_t* counts, void* workspace, cudaStream_t stream);
};

// The arithmetic of the matrix path, which multiplies points as they come: floats on tf32 units.
template <typename Math>
struct MatrixMathOf {
    using Type = Math;
};
template <int Parts>
struct MatrixMathOf<ScaledMath<Parts>> {
    using Type = Tf32Math<float, Parts == 2>;
};
template <typename Math>
using OnMatrix = MatrixEngine<typename MatrixMathOf<Math>::Type>;

// Which path a batch takes: the matrix path, or tiles.
template <typename Math>
bool takes_matrix(const Task& task) {
    const Problem& p = task.problem;
    return uses_matrix(p.queries.count, p.refs.count, sizeof(typename Math::Acc), task.tuning.matrix_bytes) !=
           0;
}

// Bytes that a path saves; what parameters that learn need lies behind.
template <typename Math>
int64_t path_bytes(const Task& task) {
    const Problem& p = task.problem;
    if (takes_matrix<Math>(task))
        return MatrixSizes<int64_t>(p.queries.count, p.refs.count, p.square, sizeof(typename Math::Acc))
            .bytes;
    return SavedLayout<Math>{task}.bytes();
}

template <typename Math>
int64_t Engine<Math>::saved_bytes(const Task& task) {
    return path_bytes<Math>(task) +
           learned_bytes<int64_t>(task.problem.queries.count, task.learned.count, sizeof(typename Math::Acc));
}

// With the place of the learned formula; for the matrix path with aligned rows, which are packed at `bytes` where they are
// not.
template <typename Math>
Task prepared_task(const Task& task, void* saved, unsigned char*& bytes, Launches& launches) {
    Task prepared =
        takes_matrix<Math>(task) ? with_aligned_rows<typename Math::Value>(task, bytes, launches) : task;
    if (task.learned.count > 0)
        prepared.learned.made = static_cast<unsigned char*>(saved) + path_bytes<Math>(task);
    return prepared;
}

template <typename Math>
int64_t Engine<Math>::forward_workspace_bytes(const Task& task) {
    if (!takes_matrix<Math>(task)) return TilePolicy<Math>::forward_workspace_bytes(task);
    return packed_bytes<typename Math::Value>(task.problem) + OnMatrix<Math>{task}.forward_workspace_bytes();
}

template <typename Math>
int64_t Engine<Math>::backward_workspace_bytes(const Task& task) {
    if (!takes_matrix<Math>(task))
        return TilePolicy<Math>::param_bytes(task) + GradientPolicy<Math>::workspace_bytes(task);
    return packed_bytes<typename Math::Value>(task.problem) + OnMatrix<Math>{task}.backward_workspace_bytes();
}

template <typename Math>
void Engine<Math>::forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
                           cudaStream_t stream) {
    Launches launches(stream);
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task aligned = prepared_task<Math>(task, saved, bytes, launches);
    Learned<typename Math::Acc>::make(aligned, launches);
    auto* result = static_cast<typename Math::Acc*>(loss);
    if (takes_matrix<Math>(task)) {
        OnMatrix<Math>{aligned}.forward(save_for_backward, saved, result, bytes, launches);
        return;
    }
    const SavedLayout<Math> layout = {aligned};
    const Launcher<Math> launcher = {aligned, layout.arrays(static_cast<unsigned char*>(saved)), launches};
    forward_tiles(launcher, result, bytes);
}

template <typename Math>
void Engine<Math>::backward(const Task& task, void* saved, const void* grad_loss, void* grad_queries,
                            void* grad_refs, void* workspace, cudaStream_t stream) {
    Launches launches(stream);
    using T = typename Math::Value;
    auto* bytes = static_cast<unsigned char*>(workspace);
    using Acc = typename Math::Acc;
    const Task aligned = prepared_task<Math>(task, saved, bytes, launches);
    const LearnedParams& learned = aligned.learned;
    const auto* upstream = static_cast<const Acc*>(grad_loss);
    T *queries = static_cast<T*>(grad_queries), *refs = static_cast<T*>(grad_refs);
    if (takes_matrix<Math>(task)) {
        OnMatrix<Math>{aligned}.backward(saved, upstream, queries, refs, bytes, launches);
        if (learned.gradient) {
            RowStats<Acc> row_stats = {};
            row_stats.header = static_cast<Acc*>(saved);
            Learned<Acc>::reduce(aligned, row_stats, upstream, launches);
        }
        return;
    }
    const SavedLayout<Math> layout = {aligned};
    const Launcher<Math> launcher = {aligned, layout.arrays(static_cast<unsigned char*>(saved)), launches};
    auto* param_sums = reinterpret_cast<double*>(bytes);
    bytes += TilePolicy<Math>::param_bytes(task);
    const TileGroupShape shape = GradientPolicy<Math>::shape(task);
    ImageSlots<Math> images(task.problem, shape, bytes, launches);
    bytes += TilePolicy<Math>::image_bytes(task.problem, shape);
    if (queries || refs) backward_tiles(launcher, upstream, queries, refs, images, bytes);
    if (learned.gradient)
        gradient_by_params(launcher, rows_by_params<Acc>(aligned), upstream, param_sums, images,
                           reinterpret_cast<Acc*>(bytes));
}

template <typename Math>
int64_t Engine<Math>::count_workspace_bytes(const Task& task) {
    return packed_bytes<typename Math::Value>(task.problem) + OnMatrix<Math>{task}.count_workspace_bytes();
}

template <typename Math>
void Engine<Math>::count_pairs(const Task& task, int64_t* counts, void* workspace, cudaStream_t stream) {
    Launches launches(stream);
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task aligned = with_aligned_rows<typename Math::Value>(task, bytes, launches);
    OnMatrix<Math>{aligned}.count(counts, bytes, launches);
}

}  // namespace dml::cuda
