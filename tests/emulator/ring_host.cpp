// The entry points on blocks of columns, built for the host with the emulator, behind a C interface for
// ctypes.
#include <cstring>

#include "cuda/ring/ring.h"
#include "guarded.h"
#include "machine.h"

using namespace dml;
using namespace dml::cuda;

namespace {

struct Arguments {  // as in blocks.py, field by field
    const void* rows;
    int64_t row_stride;
    const int64_t* row_labels;
    int64_t row_count;
    const void* block;
    int64_t block_stride;
    const int64_t* block_labels;
    int64_t block_count;
    const int64_t* self_index;
    int64_t dim, scalar, precision, formula, euclidean, normalize, reduction, mining, tile_group, wide_blocks;
    double params[kMaxParams];
    double epsilon;
};

Task task_of(const Arguments& a) {
    Task task;
    Problem& p = task.problem;
    p.queries = {a.rows, a.row_stride, a.row_labels, a.row_count};
    p.refs = {a.block, a.block_stride, a.block_labels, a.block_count};
    p.square = false;
    p.self_index = a.self_index;
    p.mine_self_pair = false;
    p.dim = a.dim;
    p.scalar = static_cast<Scalar>(a.scalar);
    p.formula = static_cast<FormulaId>(a.formula);
    std::memcpy(p.params, a.params, sizeof p.params);
    p.similarity = {a.euclidean != 0, a.normalize != 0};
    p.mining = {a.mining != 0, a.epsilon};
    p.reduction = static_cast<Reduction>(a.reduction);
    task.precision = static_cast<Precision>(a.precision);
    if (a.tile_group > 0) task.tuning.tile_group = static_cast<int>(a.tile_group);
    if (a.wide_blocks >= 0) task.tuning.wide_blocks = task.tuning.line_blocks = a.wide_blocks;
    return task;
}

}  // namespace

extern "C" {

// out: the numbers of a state; in bytes, the workspaces of forward and backward, extremes and kept flags.
void dml_block_sizes(const Arguments* a, int64_t* out) {
    const BlockSizes sizes = block_sizes(task_of(*a));
    out[0] = state_numbers(a->row_count);
    out[1] = sizes.forward_workspace;
    out[2] = sizes.backward_workspace;
    out[3] = sizes.extremes;
    out[4] = sizes.kept;
}

int dml_turn_rows(const Arguments* a, int64_t stage, void* state, char* error, int64_t capacity) {
    return guarded(error, capacity,
                   [&] { turn_rows(task_of(*a), static_cast<BlockStage>(stage), state, nullptr); });
}

int dml_add_block(const Arguments* a, int64_t stage, void* state, void* extremes, void* kept, void* workspace,
                  char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        add_block(task_of(*a), static_cast<BlockStage>(stage), state, extremes, kept, workspace, nullptr);
    });
}

int dml_finish_rows(const Arguments* a, const void* state, const int64_t* pairs, void* losses, void* weights,
                    void* flags, char* error, int64_t capacity) {
    return guarded(error, capacity,
                   [&] { finish_rows(task_of(*a), state, pairs, losses, weights, flags, nullptr); });
}

int dml_block_backward(const Arguments* a, const void* weights, const void* grad_parts, const void* kept,
                       void* grad_rows, void* grad_block, void* workspace, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        block_backward(task_of(*a), weights, grad_parts, kept, grad_rows, grad_block, workspace, nullptr);
    });
}

}  // extern "C"
