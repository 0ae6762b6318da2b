// The entry points of csrc/cuda on pairs, built for the host with the emulator, behind a C interface for
// ctypes. Python allocates everything, saved tensors and workspaces included.
#include <cstring>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "cuda/indexed/listed_pairs.h"
#include "cuda/pairs/pair_loss.h"
#include "guarded.h"
#include "machine.h"

using namespace dml;
using namespace dml::cuda;
using emulator::Arguments;
using emulator::task_of;

namespace {

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

// The task, without a cache where nothing is saved for backward.
Task task_that_saves(const Arguments& a, int save_for_backward) {
    Task task = task_of(a);
    if (!save_for_backward) task.tuning.cache_bytes = 0;
    return task;
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
void dml_sizes(const Arguments* a, int save_for_backward, int64_t* out) {
    const Task task = task_that_saves(*a, save_for_backward);
    out[0] = saved_bytes(task);
    out[1] = forward_workspace_bytes(task);
    out[2] = backward_workspace_bytes(task);
}

int dml_forward(const Arguments* a, int save_for_backward, void* saved, void* loss, void* workspace,
                char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        const emulator::DeviceFor device(a->tuning);
        forward(task_that_saves(*a, save_for_backward), save_for_backward != 0, saved, loss, workspace,
                nullptr);
    });
}

int dml_backward(const Arguments* a, int saved_for_backward, void* saved, const void* grad_loss,
                 void* grad_embeddings, void* grad_ref_emb, void* workspace, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        const emulator::DeviceFor device(a->tuning);
        backward(task_that_saves(*a, saved_for_backward), saved, grad_loss, grad_embeddings, grad_ref_emb,
                 workspace, nullptr);
    });
}

// The launches of a call, one line each (see machine.h); no kernel runs.
int dml_launches(const Arguments* a, int with_backward, int need_embeddings, int need_ref_emb, char* out,
                 int64_t out_capacity, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        const emulator::DeviceFor device(a->tuning);
        std::string record;
        emulator::record_launches(&record);
        const Task task = task_of(*a);
        alignas(16) char any[16];
        forward(task, with_backward != 0, any, any, any, nullptr);
        if (with_backward) {
            backward(task, any, any, need_embeddings ? any : nullptr, need_ref_emb ? any : nullptr, any,
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
