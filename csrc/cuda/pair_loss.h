// The CUDA engine's entry points: raw pointers, sizes and a stream. No torch header, and nothing here
// waits for the device.
#pragma once

#include <cstdint>

#include "../pair_math.h"

#if defined(DML_CUDA_ON_HOST)
#include "cuda_language.h"
#else
#include <cuda_runtime_api.h>  // for cudaStream_t
#endif

namespace dml::cuda {

enum class Scalar { kFloat16, kBFloat16, kFloat32, kFloat64 };

// How float32 inputs are multiplied: three tf32 products, one, one in bfloat16, or plain multiply-adds.
enum class Precision { kFull, kTf32, kBf16, kPlain };

// In the order of dml::Reduction, which lies in a header that needs torch.
enum class Reduction { kMean, kMeanNonzero, kMeanValid, kSum, kNone };

// One side of the pairs, with contiguous rows at any distance.
struct Points {
    const void* data = nullptr;       // [count, dim]
    int64_t stride = 0;               // from row to row, in elements
    const int64_t* labels = nullptr;  // [count]
    int64_t count = 0;
};

// Where one way of working ends and another begins. The tests lower these to reach every path with few
// points.
struct Tuning {
    int64_t strip_limit = 1024;        // rows and columns up to which a strip of S fits in shared memory
    int super_tile = 32;               // tiles along the edge of a super-tile
    int64_t cache_bytes = 34ll << 20;  // similarities kept from forward for backward
    int64_t sum_bytes = 48ll << 20;    // float32 sums of 16-bit gradients, where there is room for as much
};

struct Problem {
    Points queries;
    Points refs;  // where square, the queries themselves
    bool square = true;
    // [queries.count] which of refs each query is itself; -1, or any other number, if none. Null where no
    // query is, and where square. Mining sees this pair, but as a positive it does not count.
    const int64_t* self_ref = nullptr;
    // How many of the first refs take part, on the device; null where all do, and where square. The others
    // may hold anything, and get a gradient of 0.
    const int64_t* ref_count = nullptr;
    int64_t dim = 0;
    Scalar scalar = Scalar::kFloat32;
    Precision precision = Precision::kFull;
    PairLoss loss = PairLoss::kMultiSimilarity;
    double params[3] = {};
    bool normalize = true;
    Reduction reduction = Reduction::kMean;
    Tuning tuning;
};

struct Mining {
    bool on = false;
    double epsilon = 0.0;
};

// What forward leaves for backward; float32 or, for float64 inputs, float64 where the type is void. A tensor
// of length 0 is null.
struct Saved {
    void* stats = nullptr;
    int32_t* plan = nullptr;
    void* tiles = nullptr;
    uint8_t* kept = nullptr;
};

// Lengths in elements. They depend on the sizes and the type only, as shapes must under torch.compile.
struct SavedSizes {
    int64_t stats, plan, tiles, kept;
};
SavedSizes saved_sizes(const Problem& problem, bool save_for_backward);

int64_t forward_workspace_bytes(const Problem& problem);
int64_t backward_workspace_bytes(const Problem& problem);

// loss: one number, or [queries.count] where the reduction is kNone; float32 (float64 for float64).
void forward(const Problem& problem, const Mining& mining, const Saved& saved, void* loss, void* workspace,
             cudaStream_t stream);

// grad_loss: as loss. grad_queries [queries.count, dim] and grad_refs [refs.count, dim], contiguous and
// of the inputs' type; null where not wanted (grad_refs: always null where square).
void backward(const Problem& problem, const Saved& saved, const void* grad_loss, void* grad_queries,
              void* grad_refs, void* workspace, cudaStream_t stream);

}  // namespace dml::cuda
