// The engine of csrc/cuda, built for the host with the emulator, behind a C interface for ctypes.
// Addresses and sizes come from Python; the saved tensors and workspaces as well.
#include <cstring>
#include <exception>

#include "machine.h"
#include "pair_loss.h"

using namespace dml::cuda;

namespace {

struct Arguments {  // as in library.py, field by field
    const void* queries;
    int64_t query_stride;
    const int64_t* query_labels;
    int64_t query_count;
    const void* refs;
    int64_t ref_stride;
    const int64_t* ref_labels;
    int64_t ref_count;
    const int64_t* self_ref;
    int64_t square, dim, scalar, precision, loss, normalize, reduction, mining, strip_limit, super_tile,
        cache_bytes, sum_bytes;
    double params[3];
    double epsilon;
    void* stats;
    int32_t* plan;
    void* tiles;
    uint8_t* kept;
    void* workspace;
};

Problem problem_of(const Arguments& a) {
    Problem p;
    p.queries = {a.queries, a.query_stride, a.query_labels, a.query_count};
    p.refs = a.square ? p.queries : Points{a.refs, a.ref_stride, a.ref_labels, a.ref_count};
    p.square = a.square != 0;
    p.self_ref = a.self_ref;
    p.dim = a.dim;
    p.scalar = static_cast<Scalar>(a.scalar);
    p.precision = static_cast<Precision>(a.precision);
    p.loss = static_cast<dml::PairLoss>(a.loss);
    std::memcpy(p.params, a.params, sizeof p.params);
    p.normalize = a.normalize != 0;
    p.reduction = static_cast<Reduction>(a.reduction);
    if (a.strip_limit >= 0) p.tuning.strip_limit = a.strip_limit;
    if (a.super_tile > 0) p.tuning.super_tile = static_cast<int>(a.super_tile);
    if (a.cache_bytes >= 0) p.tuning.cache_bytes = a.cache_bytes;
    if (a.sum_bytes >= 0) p.tuning.sum_bytes = a.sum_bytes;
    return p;
}

// 0, or 1 with the message in `error`.
template <typename F>
int guarded(char* error, int64_t capacity, const F& f) {
    try {
        f();
        return 0;
    } catch (const std::exception& e) {
        std::strncpy(error, e.what(), size_t(capacity) - 1);
        error[capacity - 1] = 0;
        return 1;
    }
}

}  // namespace

extern "C" {

void dml_set_schedule(int warp_first, int64_t seed) {
    emulator::set_schedule(warp_first ? emulator::Schedule::kWarpFirst : emulator::Schedule::kRoundRobin,
                           uint64_t(seed));
}

// out: stats, plan, tiles, kept (elements); forward and backward workspace (bytes).
void dml_sizes(const Arguments* a, int save_for_backward, int64_t* out) {
    const Problem p = problem_of(*a);
    const SavedSizes s = saved_sizes(p, save_for_backward != 0);
    const int64_t sizes[6] = {
        s.stats, s.plan, s.tiles, s.kept, forward_workspace_bytes(p), backward_workspace_bytes(p)};
    std::memcpy(out, sizes, sizeof sizes);
}

int dml_forward(const Arguments* a, void* loss, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        forward(problem_of(*a), {a->mining != 0, a->epsilon}, {a->stats, a->plan, a->tiles, a->kept}, loss,
                a->workspace, nullptr);
    });
}

int dml_backward(const Arguments* a, const void* grad_loss, void* grad_queries, void* grad_refs, char* error,
                 int64_t capacity) {
    return guarded(error, capacity, [&] {
        backward(problem_of(*a), {a->stats, a->plan, a->tiles, a->kept}, grad_loss, grad_queries, grad_refs,
                 a->workspace, nullptr);
    });
}

}  // extern "C"
