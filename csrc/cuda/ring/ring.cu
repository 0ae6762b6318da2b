// The entry points on blocks of columns.
#include "cuda/pairs/arithmetic.h"
#include "cuda/ring/ring.cuh"

namespace dml::cuda {

DML_EXTERN_ENGINES(BlockEngine)

BlockSizes block_sizes(const Task& task) {
    return with_arithmetic<BlockEngine>(task, [&](auto engine) { return engine.sizes(task); });
}

void add_block(const Task& task, BlockStage stage, void* state, void* extremes, void* kept, void* workspace,
               cudaStream_t stream) {
    with_arithmetic<BlockEngine>(
        task, [&](auto engine) { engine.add(task, stage, state, extremes, kept, workspace, stream); });
}

void block_backward(const Task& task, const void* weights, const void* grad_parts, const void* kept,
                    void* grad_rows, void* grad_block, void* workspace, cudaStream_t stream) {
    with_arithmetic<BlockEngine>(task, [&](auto engine) {
        engine.backward(task, weights, grad_parts, kept, grad_rows, grad_block, workspace, stream);
    });
}

const BlockEntryPoints kBlockEntryPoints = {block_sizes, turn_rows, add_block, finish_rows, block_backward};

}  // namespace dml::cuda
