// The CUDA engine a block of columns at a time, for who never holds all of them: a ring of processes
// (dml_cuda.distributed). The problem's queries are the rows, its refs are one block; square is false and
// mine_self_pair too. The rows' numbers go from call to call in a state, [state_numbers(rows)] of the type
// that is computed in: first the header of RowStats, then its arrays.
//
// A formula's blocks pass once a stage, and the rows turn after it. With mining first kHardest; then
// kNegatives and kPositives where the formula's positives see a context, else kBoth. Blocks are added in the
// order of the calls, which is that of every sum.
#pragma once

#include "cuda/pairs/pair_loss.h"

namespace dml::cuda {

enum class BlockStage { kStart, kHardest, kNegatives, kPositives, kBoth };

// Bytes; of extremes and kept 0 where there are too many tiles to know them.
struct BlockSizes {
    int64_t forward_workspace, backward_workspace;
    int64_t extremes;  // the least positive and the greatest negative similarity of each tile
    int64_t kept;      // of each tile, whether some pair may have a gradient (the lowest bit)
};
BlockSizes block_sizes(const Task& task);

// Makes the state of new rows (kStart), or turns it from the stage that all blocks have passed to the next.
// Of the task: the formula, mining, the type and the number of queries.
void turn_rows(const Task& task, BlockStage stage, void* state, cudaStream_t stream);

// Adds a block to the state. extremes: kHardest writes them; the other stages may be given them, to skip
// what mining emptied, or null. kept: written; in kPositives it holds that of kNegatives before.
void add_block(const Task& task, BlockStage stage, void* state, void* extremes, void* kept, void* workspace,
               cudaStream_t stream);

// From the state to what the rows come to: losses [4, rows], parts 0 and 1 and their counts; weights, as a
// state, for backward. pairs [2, rows]: how many positives and negatives a row has. flags: [rows] bytes to
// work with.
void finish_rows(const Task& task, const void* state, const int64_t* pairs, void* losses, void* weights,
                 void* flags, cudaStream_t stream);

// grad_parts [2, rows]: the gradient by each row's parts. grad_rows [rows, dim] and grad_block [refs.count,
// dim], of the type that is computed in; null where not wanted. Neither side may be empty.
void block_backward(const Task& task, const void* weights, const void* grad_parts, const void* kept,
                    void* grad_rows, void* grad_block, void* workspace, cudaStream_t stream);

// As EntryPoints.
struct BlockEntryPoints {
    decltype(cuda::block_sizes)* sizes;
    decltype(cuda::turn_rows)* turn;
    decltype(cuda::add_block)* add;
    decltype(cuda::finish_rows)* finish;
    decltype(cuda::block_backward)* backward;
};
extern const BlockEntryPoints kBlockEntryPoints;

}  // namespace dml::cuda
