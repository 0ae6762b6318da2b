// The entry points on pairs.
#include "cuda/pairs/arithmetic.h"
#include "cuda/pairs/engine.cuh"
#include "cuda/pairs/pair_loss.h"
#include "cuda/ring/ring.h"

namespace dml::cuda {

DML_EXTERN_ENGINES(Engine)

int64_t saved_bytes(const Task& task) {
    return with_arithmetic<Engine>(task, [&](auto engine) { return engine.saved_bytes(task); });
}

int64_t forward_workspace_bytes(const Task& task) {
    return with_arithmetic<Engine>(task, [&](auto engine) { return engine.forward_workspace_bytes(task); });
}

int64_t backward_workspace_bytes(const Task& task) {
    return with_arithmetic<Engine>(task, [&](auto engine) { return engine.backward_workspace_bytes(task); });
}

void forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
             cudaStream_t stream) {
    with_arithmetic<Engine>(
        task, [&](auto engine) { engine.forward(task, save_for_backward, saved, loss, workspace, stream); });
}

void backward(const Task& task, void* saved, const void* grad_loss, void* grad_queries, void* grad_refs,
              void* workspace, cudaStream_t stream) {
    with_arithmetic<Engine>(task, [&](auto engine) {
        engine.backward(task, saved, grad_loss, grad_queries, grad_refs, workspace, stream);
    });
}

int64_t count_workspace_bytes(const Task& task) {
    return with_arithmetic<Engine>(task, [&](auto engine) { return engine.count_workspace_bytes(task); });
}

void count_pairs(const Task& task, int64_t* counts, void* workspace, cudaStream_t stream) {
    with_arithmetic<Engine>(task, [&](auto engine) { engine.count_pairs(task, counts, workspace, stream); });
}

const EntryPoints kEntryPoints = {saved_bytes, forward_workspace_bytes, backward_workspace_bytes, forward,
                                  backward,    &kBlockEntryPoints};

}  // namespace dml::cuda
