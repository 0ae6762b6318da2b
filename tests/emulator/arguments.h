// The arguments of a call as library.py passes them, field by field, and the task that they make.
#pragma once

#include <cstring>

#include "cuda/pairs/pair_loss.h"
#include "machine.h"

namespace emulator {

struct PointRows {
    const void* data;  // [count, dim]
    int64_t count, stride;
};

struct Batch {
    PointRows embeddings;
    const int64_t* labels;
    PointRows ref_emb;
    const int64_t* ref_labels;
    const int64_t* self_index;
    const int64_t* num_valid_refs;
    const void* row_weights;
    int64_t square, dim, scalar;  // square: there is no ref_emb
};

struct Options {
    int64_t formula;
    double params[dml::kMaxParams];
    int64_t mining;
    double epsilon;
    int64_t euclidean, normalize, reduction, mine_self_pair, return_sums, precision;
    const double* learned;  // params in place of those above, or null
    double* by_params;      // for backward to write, or null
};

struct TuningOptions {  // negative: the default
    int64_t matrix_bytes, small_tile_pairs, long_row, whole_line, gradient_blocks, tile_group, cache_bytes,
        sum_bytes, wide_blocks, line_blocks, split_slots, wgmma;
};

struct Arguments {
    Batch batch;
    Options options;
    TuningOptions tuning;
};

inline dml::cuda::Task task_of(const Arguments& a) {
    const Batch& b = a.batch;
    const Options& o = a.options;
    dml::cuda::Task task;
    dml::Problem& p = task.problem;
    p.queries = {b.embeddings.data, b.embeddings.stride, b.labels, b.embeddings.count};
    p.refs =
        b.square ? p.queries : dml::Points{b.ref_emb.data, b.ref_emb.stride, b.ref_labels, b.ref_emb.count};
    p.square = b.square != 0;
    p.self_index = b.self_index;
    p.num_valid_refs = b.num_valid_refs;
    task.row_weights = b.row_weights;
    p.dim = b.dim;
    p.scalar = static_cast<dml::Scalar>(b.scalar);
    p.formula = static_cast<dml::FormulaId>(o.formula);
    std::memcpy(p.params, o.params, sizeof p.params);
    if (o.learned) task.learned = {dml::kFormulas[o.formula].params, o.learned, o.by_params, nullptr};
    p.mining = {o.mining != 0, o.epsilon};
    p.similarity = {o.euclidean != 0, o.normalize != 0};
    p.reduction = static_cast<dml::Reduction>(o.reduction);
    p.mine_self_pair = o.mine_self_pair != 0;
    p.return_sums = o.return_sums != 0;
    task.precision = static_cast<dml::cuda::Precision>(o.precision);

    const auto set = [](auto& field, int64_t value) {
        if (value >= 0) field = static_cast<std::decay_t<decltype(field)>>(value);
    };
    const TuningOptions& t = a.tuning;
    set(task.tuning.matrix_bytes, t.matrix_bytes);
    set(task.tuning.small_tile_pairs, t.small_tile_pairs);
    set(task.tuning.long_row, t.long_row);
    set(task.tuning.whole_line, t.whole_line);
    set(task.tuning.gradient_blocks, t.gradient_blocks);
    set(task.tuning.tile_group, t.tile_group);
    set(task.tuning.cache_bytes, t.cache_bytes);
    set(task.tuning.sum_bytes, t.sum_bytes);
    set(task.tuning.wide_blocks, t.wide_blocks);
    set(task.tuning.line_blocks, t.line_blocks);
    set(task.tuning.split_slots, t.split_slots);
    set(task.tuning.wgmma, t.wgmma);
    return task;
}

// While it lives the device has wgmma, if these ask for it.
class DeviceFor {
    const Device before_ = device();

   public:
    explicit DeviceFor(const TuningOptions& tuning) {
        if (tuning.wgmma > 0) device() = {4, 227 * 1024, 90};
    }
    ~DeviceFor() { device() = before_; }
};

}  // namespace emulator
