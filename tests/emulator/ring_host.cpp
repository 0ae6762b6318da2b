// The entry points on blocks of columns, built for the host with the emulator, behind a C interface for
// ctypes. A block is the batch's ref_emb.
#include "arguments.h"
#include "cuda/ring/ring.h"
#include "guarded.h"
#include "machine.h"

using namespace dml;
using namespace dml::cuda;
using emulator::Arguments;
using emulator::task_of;

extern "C" {

// out: the numbers of a state; in bytes, the workspaces of forward and backward, extremes and kept flags.
void dml_block_sizes(const Arguments* a, int64_t* out) {
    const BlockSizes sizes = block_sizes(task_of(*a));
    out[0] = state_numbers(a->batch.embeddings.count);
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
        const emulator::DeviceFor device(a->tuning);
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
        const emulator::DeviceFor device(a->tuning);
        block_backward(task_of(*a), weights, grad_parts, kept, grad_rows, grad_block, workspace, nullptr);
    });
}

}  // extern "C"
