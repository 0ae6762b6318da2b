// The entry points of csrc/cuda, built for the host with the emulator, behind a C interface for ctypes.
// Addresses and sizes come from Python; the saved tensors and workspaces as well.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/indexed/listed_pairs.h"
#include "cuda/pairs/pair_loss.h"
#include "guarded.h"
#include "machine.h"

using namespace dml;
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
    int64_t num_valid_refs;
    const int64_t* self_index;
    const int64_t* used_refs;
    int64_t square, dim, scalar, precision, formula, euclidean, normalize, reduction, return_sums, mining,
        mine_self_pair, save_for_backward, strip_limit, tile_group, cache_bytes, sum_bytes, wide_blocks,
        line_blocks, split_slots;
    double params[kMaxParams];
    double epsilon;
    void* saved;
    void* workspace;
};

Task task_of(const Arguments& a) {
    Task task;
    Problem& p = task.problem;
    p.queries = {a.queries, a.query_stride, a.query_labels, a.query_count};
    p.refs = a.square ? p.queries : Points{a.refs, a.ref_stride, a.ref_labels, a.num_valid_refs};
    p.square = a.square != 0;
    p.self_index = a.self_index;
    p.mine_self_pair = a.mine_self_pair != 0;
    p.num_valid_refs = a.used_refs;
    p.dim = a.dim;
    p.scalar = static_cast<Scalar>(a.scalar);
    p.formula = static_cast<FormulaId>(a.formula);
    std::memcpy(p.params, a.params, sizeof p.params);
    p.similarity = {a.euclidean != 0, a.normalize != 0};
    p.mining = {a.mining != 0, a.epsilon};
    p.reduction = static_cast<Reduction>(a.reduction);
    p.return_sums = a.return_sums != 0;
    task.precision = static_cast<Precision>(a.precision);
    if (a.strip_limit >= 0) task.tuning.strip_limit = a.strip_limit;
    if (a.tile_group > 0) task.tuning.tile_group = static_cast<int>(a.tile_group);
    if (a.cache_bytes >= 0) task.tuning.cache_bytes = a.cache_bytes;
    if (a.sum_bytes >= 0) task.tuning.sum_bytes = a.sum_bytes;
    if (a.wide_blocks >= 0) task.tuning.wide_blocks = a.wide_blocks;
    if (a.line_blocks >= 0) task.tuning.line_blocks = a.line_blocks;
    if (a.split_slots >= 0) task.tuning.split_slots = a.split_slots;
    return task;
}

// Calls f with a null pointer of the type.
template <typename F>
void with_type(int wide, const F& f) {
    if (wide) {
        f(static_cast<double*>(nullptr));
    } else {
        f(static_cast<float*>(nullptr));
    }
}

template <typename T>
PointList<T> point_list(T*, const void* data, int64_t count, int64_t dim) {
    return {static_cast<const T*>(data), count, dim};
}

}  // namespace

extern "C" {

void dml_set_schedule(int warp_first, int64_t seed) {
    emulator::set_schedule(warp_first ? emulator::Schedule::kWarpFirst : emulator::Schedule::kRoundRobin,
                           uint64_t(seed));
}

// The names of the formulas, in the order of their numbers, each ended by a newline.
const char* dml_formula_names() {
    static const std::string names = [] {
        std::string all;
        for (const FormulaInfo& formula : kFormulas) all += std::string(formula.name) + "\n";
        return all;
    }();
    return names.c_str();
}

// out, in bytes: what is saved, the workspaces of forward and backward.
void dml_sizes(const Arguments* a, int64_t* out) {
    const Task task = task_of(*a);
    out[0] = saved_bytes(task, a->save_for_backward != 0);
    out[1] = forward_workspace_bytes(task);
    out[2] = backward_workspace_bytes(task);
}

int dml_forward(const Arguments* a, void* loss, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        forward(task_of(*a), a->save_for_backward != 0, a->saved, loss, a->workspace, nullptr);
    });
}

int dml_backward(const Arguments* a, const void* grad_loss, void* grad_queries, void* grad_refs, char* error,
                 int64_t capacity) {
    return guarded(error, capacity, [&] {
        backward(task_of(*a), a->save_for_backward != 0, a->saved, grad_loss, grad_queries, grad_refs,
                 a->workspace, nullptr);
    });
}

// The launches of a call that runs none of them, one line each (see machine.h).
int dml_launches(const Arguments* a, int with_backward, int need_queries, int need_refs, char* out,
                 int64_t out_capacity, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        std::string record;
        emulator::record_launches(&record);
        const Task task = task_of(*a);
        alignas(16) char any[16];
        forward(task, with_backward != 0, any, any, any, nullptr);
        if (with_backward) {
            backward(task, true, any, any, need_queries ? any : nullptr, need_refs ? any : nullptr, any,
                     nullptr);
        }
        emulator::record_launches(nullptr);
        if (int64_t(record.size()) >= out_capacity) throw std::runtime_error("too many launches");
        std::memcpy(out, record.c_str(), record.size() + 1);
    });
}

// ---- pairs given as lists; wide: double instead of float ----------------------------------------------

int dml_multiply_pairs(int wide, const void* x, int64_t x_count, const void* y, int64_t y_count, int64_t dim,
                       const int64_t* rows, const int64_t* cols, int64_t pairs, void* out, char* error,
                       int64_t capacity) {
    return guarded(error, capacity, [&] {
        with_type(wide, [&](auto* t) {
            multiply_pairs(point_list(t, x, x_count, dim), point_list(t, y, y_count, dim), rows, cols, pairs,
                           static_cast<decltype(t)>(out), nullptr);
        });
    });
}

int dml_sum_pairs(int wide, const void* weights, const void* points, int64_t count, int64_t dim,
                  const int64_t* index, const int64_t* offsets, int64_t segments, int64_t length, void* out,
                  char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        with_type(wide, [&](auto* t) {
            sum_pairs(point_list(t, weights, length, 1).data, point_list(t, points, count, dim), index,
                      {offsets, segments, length}, static_cast<decltype(t)>(out), nullptr);
        });
    });
}

int dml_log_sum_exps(int wide, const void* logits, const int64_t* offsets, int64_t segments, int64_t length,
                     int64_t plus_one, void* out, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        with_type(wide, [&](auto* t) {
            log_sum_exps(point_list(t, logits, length, 1).data, {offsets, segments, length}, plus_one != 0,
                         static_cast<decltype(t)>(out), nullptr);
        });
    });
}

int dml_softmaxes(int wide, const void* grad, const void* logits, const void* value, const int64_t* offsets,
                  int64_t segments, int64_t length, void* out, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        with_type(wide, [&](auto* t) {
            softmaxes(point_list(t, grad, segments, 1).data, point_list(t, logits, length, 1).data,
                      point_list(t, value, segments, 1).data, {offsets, segments, length},
                      static_cast<decltype(t)>(out), nullptr);
        });
    });
}

}  // extern "C"
