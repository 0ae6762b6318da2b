// Ring mode of the CUDA engine: one block of columns a call, row state carried over (dml_cuda.distributed).
// The problem's queries are the rows, its refs one block; square and mine_self_pair are false. The rows'
// numbers go from call to call in a state, [state_numbers(rows)] of the accumulating type: the header of
// RowStats, then its arrays.
//
// In each stage every block is added once, then turn_rows ends the stage. With mining the first stage is
// kHardest; then come kNegatives and kPositives where the formula's positives see a context, else kBoth. Sums
// follow the order of the calls.
#pragma once

#include "cuda/pairs/pair_loss.h"

namespace dml::cuda {

enum class BlockStage { kStart, kHardest, kNegatives, kPositives, kBoth };

// Where parameters learn, each call makes the formula of their values at the beginning of its workspace.

// Bytes; extremes and kept are 0 where there are too many tiles to store them.
struct BlockSizes {
    int64_t forward_workspace, backward_workspace;
    int64_t extremes;  // the least positive and the greatest negative similarity of each tile
    int64_t kept;      // of each tile, whether a pair may have a gradient (the lowest bit)
};
BlockSizes block_sizes(const Task& task);

// Makes the state of new rows (kStart), or ends a stage that all blocks have passed. Of the task it reads the
// formula, mining, the type and the number of queries.
void turn_rows(const Task& task, BlockStage stage, void* state, cudaStream_t stream);

// Adds a block to the state. extremes: written by kHardest; read by the other stages to skip tiles that
// mining emptied, or null. kept: written; in kPositives it comes as kNegatives left it.
void add_block(const Task& task, BlockStage stage, void* state, void* extremes, void* kept, void* workspace,
               cudaStream_t stream);

// From the state to losses [4, rows] (parts 0 and 1, counts 0 and 1) and weights [weight_numbers], a state for
// backward and behind it, where parameters learn, what they do to the rows' parts for constant terms [params,
// 2, rows]. pairs [2, rows]: the numbers of a row's positives and negatives. workspace: finish_bytes.
inline int64_t weight_numbers(const Task& task) {
    const int64_t rows = task.problem.queries.count;
    return state_numbers(rows) + 2 * task.learned.count * rows;
}
inline int64_t finish_bytes(const Task& task) {
    return learned_bytes<int64_t>(0, task.learned.count, 1) + task.problem.queries.count;
}
void finish_rows(const Task& task, const void* state, const int64_t* pairs, void* losses, void* weights,
                 void* workspace, cudaStream_t stream);

// grad_parts [2, rows]: the gradient by each row's parts. grad_rows [rows, dim] and grad_block [refs.count,
// dim], of the accumulating type; null where not wanted. The gradient by parameters that learn is that of the
// block's terms. Neither side may be empty.
void block_backward(const Task& task, const void* weights, const void* grad_parts, const void* kept,
                    void* grad_rows, void* grad_block, void* workspace, cudaStream_t stream);

// As EntryPoints of pair_loss.h.
struct BlockEntryPoints {
    decltype(cuda::block_sizes)* sizes;
    decltype(cuda::turn_rows)* turn;
    decltype(cuda::add_block)* add;
    decltype(cuda::finish_rows)* finish;
    decltype(cuda::block_backward)* backward;
};
extern const BlockEntryPoints kBlockEntryPoints;

}  // namespace dml::cuda
