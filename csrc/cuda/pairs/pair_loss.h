// Entry points of the CUDA engine: raw pointers, sizes and a stream; no torch header, no host
// synchronisation.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

#include "core/problem.h"
#include "cuda/pairs/saved_sizes.h"

#if defined(DML_CUDA_ON_HOST)
#include "../../../tests/emulator/cuda_language.h"
#else
#include <cuda_runtime_api.h>  // for cudaStream_t
#endif

namespace dml::cuda {

// Whether wgmma, which has not run on hardware, is asked for: by DML_CUDA_WGMMA=1.
inline bool asks_for_wgmma() {
    static const bool asks = [] {
        const char* const value = std::getenv("DML_CUDA_WGMMA");
        return value && std::string(value) == "1";
    }();
    return asks;
}

// How float32 inputs are multiplied: as accurately as float32, or as tf32.
enum class Precision { kFull, kTf32 };

// Thresholds between paths. Tests lower them to reach every path with few points.
struct Tuning {
    int64_t matrix_bytes = kMatrixBytes;  // similarities up to which the matrix path serves
    int64_t small_tile_pairs = 1 << 19;   // pairs up to which it multiplies small tiles
    int64_t long_row = 2048;              // columns beyond which a block has a row
    int64_t whole_line = 1024;            // rows and columns up to which its gradient is one launch
    int64_t gradient_blocks = 128;        // blocks that a gradient is cut into beyond
    int tile_group = 32;                  // a tile group has the area of a square with so many tiles an edge
    int64_t cache_bytes = kCacheBytes;    // tiles' similarities kept from forward for backward
    int64_t sum_bytes = 48ll << 20;       // float32 sums of 16-bit gradients, where there is room for as much
    int64_t wide_blocks = 128;            // thread blocks from which on a gradient is cut into wide panels
    int64_t line_blocks = 512;            // thread blocks that share the long lines of a gradient
    int64_t split_slots = 2;              // tiles of a line worth a thread block of their own in the gradient
    bool wgmma = asks_for_wgmma();        // whether Hopper GPUs multiply tiles by wgmma
};

// Parameters that are on the device, in place of those of the problem.
struct LearnedParams {
    int count = 0;                   // of the formula's parameters, or 0
    const double* values = nullptr;  // [count]
    double* gradient = nullptr;      // [count + 1], for backward to write, the last number 0; or null
    // Where in `saved` the formula lies, set by the engine: see learned_bytes.
    unsigned char* made = nullptr;

    unsigned* ticket() const {
        return reinterpret_cast<unsigned*>(made + kFormulaBytes + count * kByParamBytes);
    }
    unsigned char* rows() const { return reinterpret_cast<unsigned char*>(ticket()) + kTicketBytes; }
};

struct Task {
    Problem problem;
    Precision precision = Precision::kFull;
    Tuning tuning;
    const void* row_weights = nullptr;  // [queries.count] factors of the rows' losses, of the type of sums
    LearnedParams learned;
};

// Bytes that forward leaves for backward, a multiple of 16. They depend on sizes and type only, as shapes must
// under torch.compile.
int64_t saved_bytes(const Task& task);
int64_t forward_workspace_bytes(const Task& task);
int64_t backward_workspace_bytes(const Task& task);

// save_for_backward: whether a backward may follow. loss: one number; four where the problem returns sums; [queries.count] where the reduction is kNone.
// float32 (float64 for float64). saved: aligned to 16 bytes.
void forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
             cudaStream_t stream);

// grad_loss: as loss. grad_queries [queries.count, dim] and grad_refs [refs.count, dim], contiguous and
// of the inputs' type; null where not wanted (grad_refs: always null where square).
void backward(const Task& task, void* saved, const void* grad_loss, void* grad_queries, void* grad_refs,
              void* workspace, cudaStream_t stream);

// counts: [2, queries.count], how many positives and negatives mining keeps of each row. Of the task it knows the
// points, their similarity, and mining.
int64_t count_workspace_bytes(const Task& task);
void count_pairs(const Task& task, int64_t* counts, void* workspace, cudaStream_t stream);

struct BlockEntryPoints;  // cuda/ring/ring.h

// The functions above, as a library of one custom formula hands them over (custom/library.h); there
// problem.formula is 0.
struct EntryPoints {
    decltype(cuda::saved_bytes)* saved_bytes;
    decltype(cuda::forward_workspace_bytes)* forward_workspace_bytes;
    decltype(cuda::backward_workspace_bytes)* backward_workspace_bytes;
    decltype(cuda::forward)* forward;
    decltype(cuda::backward)* backward;
    const BlockEntryPoints* blocks;
};
extern const EntryPoints kEntryPoints;

}  // namespace dml::cuda
