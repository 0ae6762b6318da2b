// The CUDA engine by itself, without torch: correctness of its two paths, times of their kernels, and the
// constants of the hardware that decide between designs. Built by tools/bench_kernels.py, with nvcc for a GPU
// or with g++ for the emulator. Prints one JSON object a line. Arguments: constants, check, times, cases (few of
// check's, for the sanitizers), or several; without any all but cases. With `dependent` first, kernels may begin
// while the one before them ends; with `wgmma`, tiles are multiplied so.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/common/launch.h"
#include "cuda/pairs/pair_loss.h"

using namespace dml;
using namespace dml::cuda;

namespace {

// ---- the device: memory, clock ---------------------------------------------------------------------------

#if defined(DML_CUDA_ON_HOST)
constexpr bool kOnHost = true;
void* allocate(size_t bytes) { return std::malloc(bytes); }
void release(void* memory) { std::free(memory); }
void copy_to_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void copy_to_host(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
// Microseconds of a call; the emulator has no clock.
double time_of(cudaStream_t, const std::function<void()>& call) {
    call();
    return 0.0;
}
#else
constexpr bool kOnHost = false;
void* allocate(size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "no memory");
    return memory;
}
void release(void* memory) { cudaFree(memory); }
void copy_to_device(void* to, const void* from, size_t bytes) {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy");
}
void copy_to_host(void* to, const void* from, size_t bytes) {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy");
}
// Median microseconds of a call in a CUDA graph, the L2 cache overwritten before each.
double time_of(cudaStream_t stream, const std::function<void()>& call) {
    constexpr int kRuns = 15;
    constexpr size_t kFlush = 256 << 20;
    static void* const flush = allocate(kFlush);
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    call();
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&ready, graph, 0), "graph");
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    std::vector<float> times;
    for (int k = 0; k < kRuns; ++k) {
        check(cudaMemsetAsync(flush, k, kFlush, stream), "flush");
        check(cudaEventRecord(begin, stream), "event");
        check(cudaGraphLaunch(ready, stream), "graph");
        check(cudaEventRecord(end, stream), "event");
        check(cudaEventSynchronize(end), "a kernel failed");
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
        times.push_back(1000 * milliseconds);
    }
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    return times[kRuns / 2];
}
#endif

template <typename T>
struct Array {
    size_t count;
    std::unique_ptr<void, void (*)(void*)> data;

    explicit Array(size_t n) : count(n), data(allocate(std::max<size_t>(n, 1) * sizeof(T)), release) {}
    explicit Array(const std::vector<T>& values) : Array(values.size()) {
        copy_to_device(data.get(), values.data(), count * sizeof(T));
    }
    T* get() const { return static_cast<T*>(data.get()); }
    std::vector<T> read() const {
        std::vector<T> values(count);
        copy_to_host(values.data(), data.get(), count * sizeof(T));
        return values;
    }
};

struct Stream {
    cudaStream_t stream = nullptr;
#if !defined(DML_CUDA_ON_HOST)
    Stream() { check(cudaStreamCreate(&stream), "stream"); }
    ~Stream() { cudaStreamDestroy(stream); }
#endif
};

// ---- a batch -----------------------------------------------------------------------------------------------

enum class Kind { kFloat32, kTf32, kBFloat16, kFloat16, kFloat64 };
constexpr const char* kKindNames[] = {"float32", "tf32", "bfloat16", "float16", "float64"};
constexpr Scalar kScalars[] = {Scalar::kFloat32, Scalar::kFloat32, Scalar::kBFloat16, Scalar::kFloat16,
                               Scalar::kFloat64};

// Calls f(a number of this kind).
template <typename F>
auto with_number(Kind kind, const F& f) {
    if (kind == Kind::kFloat64) return f(double());
    if (kind == Kind::kBFloat16) return f(__nv_bfloat16());
    if (kind == Kind::kFloat16) return f(__half());
    return f(float());
}

// Numbers around class centres, rounded to bfloat16, so that all types have the same. Another seed gives other
// points around the same centres.
std::vector<float> make_points(int64_t n, int64_t dim, const std::vector<int64_t>& labels, uint32_t seed) {
    uint32_t state = 1;
    const auto draw = [&] {
        state = state * 1664525u + 1013904223u;
        return float(state >> 8) / float(1 << 23) - 1.0f;
    };
    std::vector<float> centres(size_t(64 * dim)), points(size_t(n * dim));
    for (float& x : centres) x = draw();
    state += seed;
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t d = 0; d < dim; ++d) {
            const float x = centres[size_t(labels[size_t(i)] % 64 * dim + d)] + draw();
            uint32_t bits;
            std::memcpy(&bits, &x, sizeof bits);
            bits &= 0xffff0000u;
            std::memcpy(&points[size_t(i * dim + d)], &bits, sizeof bits);
        }
    }
    return points;
}

std::vector<unsigned char> as_kind(const std::vector<float>& x, Kind kind) {
    return with_number(kind, [&](auto number) {
        std::vector<unsigned char> bytes(x.size() * sizeof number);
        for (size_t i = 0; i < x.size(); ++i) {
            number = decltype(number)(x[i]);
            std::memcpy(&bytes[i * sizeof number], &number, sizeof number);
        }
        return bytes;
    });
}

std::vector<double> as_doubles(const std::vector<unsigned char>& bytes, Kind kind) {
    return with_number(kind, [&](auto number) {
        std::vector<double> x(bytes.size() / sizeof number);
        for (size_t i = 0; i < x.size(); ++i) {
            std::memcpy(&number, &bytes[i * sizeof number], sizeof number);
            if constexpr (sizeof number == 2) {
                x[i] = double(float(number));
            } else {
                x[i] = double(number);
            }
        }
        return x;
    });
}

struct Shape {
    int64_t n, m, dim;  // m: 0 where square
};

// Parameters of formulas, by name; others take those of their constructors' ranges.
std::vector<double> params_of(const FormulaInfo& formula) {
    const std::pair<const char*, std::vector<double>> known[] = {{"multi_similarity", {2, 50, 0.5}},
                                                                 {"circle", {0.4, 80, 1}},
                                                                 {"contrastive", {0.9, 0.2}},
                                                                 {"binomial_deviance", {2, 40, 0.5}},
                                                                 {"nt_xent", {0.1}},
                                                                 {"sup_con", {0.1}},
                                                                 {"lifted_structure", {-1, -0.5}},
                                                                 {"nca", {8}},
                                                                 {"tuplet_margin", {6, 16}},
                                                                 {"ranked_list", {0.2, 4, 1}},
                                                                 {"margin_softmax", {16, 0.1, 1, 0}},
                                                                 {"proxy_anchor", {0.1, 32}}};
    for (const auto& [name, params] : known) {
        if (formula.name == name && int(params.size()) == formula.params) return params;
    }
    return std::vector<double>(size_t(formula.params), 0.5);
}

struct Batch {
    Kind kind;
    Shape shape;
    std::vector<int64_t> labels, ref_labels;
    Array<int64_t> device_labels, device_ref_labels;
    Array<unsigned char> queries, refs;
    Task task;

    static std::vector<int64_t> make_labels(int64_t n) {
        std::vector<int64_t> labels(size_t(n), 0);
        for (int64_t i = 0; i < n; ++i) labels[size_t(i)] = i * 7 % std::max<int64_t>(n / 4, 1) % 64;
        return labels;
    }
    Batch(Kind type, Shape of, const FormulaInfo& formula, bool mining)
        : kind(type),
          shape(of),
          labels(make_labels(of.n)),
          ref_labels(make_labels(of.m)),
          device_labels(labels),
          device_ref_labels(ref_labels),
          queries(as_kind(make_points(of.n, of.dim, labels, 0), type)),
          refs(as_kind(make_points(of.m, of.dim, ref_labels, 1), type)) {
        Problem& p = task.problem;
        p.queries = {queries.get(), of.dim, device_labels.get(), of.n};
        p.square = of.m == 0;
        p.refs = p.square ? p.queries : Points{refs.get(), of.dim, device_ref_labels.get(), of.m};
        p.dim = of.dim;
        p.scalar = kScalars[int(type)];
        p.formula = formula.id;
        const auto params = params_of(formula);
        std::copy(params.begin(), params.end(), p.params);
        p.mining = {mining, 0.1};
        task.precision = type == Kind::kTf32 ? Precision::kTf32 : Precision::kFull;
    }
};

// What the engine makes of a batch, and the buffers that it asks for.
struct Call {
    const Batch& batch;
    Task task;
    Array<unsigned char> saved, loss, forward_space, backward_space, upstream, of_queries, of_refs;

    Call(const Batch& of, bool matrix)
        : batch(of),
          task(with_path(of.task, matrix)),
          saved(size_t(saved_bytes(task))),
          loss(8),
          forward_space(size_t(forward_workspace_bytes(task))),
          backward_space(size_t(backward_workspace_bytes(task))),
          upstream(as_kind({1.0f}, of.kind == Kind::kFloat64 ? Kind::kFloat64 : Kind::kFloat32)),
          of_queries(of.queries.count),
          of_refs(of.refs.count) {}

    static Task with_path(Task task, bool matrix) {
        if (!matrix) task.tuning.matrix_bytes = 0;
        return task;
    }
    void forward(cudaStream_t stream) const {
        cuda::forward(task, true, saved.get(), loss.get(), forward_space.get(), stream);
    }
    void backward(cudaStream_t stream) const {
        cuda::backward(task, saved.get(), upstream.get(), of_queries.get(),
                       batch.shape.m > 0 ? of_refs.get() : nullptr, backward_space.get(), stream);
    }
    // The loss, then all gradients.
    std::vector<double> results() const {
        const Stream own;
        forward(own.stream);
        backward(own.stream);
        const bool wide = batch.kind == Kind::kFloat64;
        std::vector<unsigned char> first = loss.read();
        first.resize(wide ? 8 : 4);
        std::vector<double> all = as_doubles(first, wide ? Kind::kFloat64 : Kind::kFloat32);
        for (const auto* side : {&of_queries, &of_refs}) {
            const std::vector<double> more = as_doubles(side->read(), batch.kind);
            all.insert(all.end(), more.begin(), more.end());
        }
        return all;
    }
};

// ---- what is asked -----------------------------------------------------------------------------------------

const FormulaInfo& formula_named(const char* name) {
    return *std::find_if(std::begin(kFormulas), std::end(kFormulas),
                         [&](const auto& f) { return f.name == name; });
}

double relative_error(const std::vector<double>& x, const std::vector<double>& truth, size_t first) {
    double error = 0, norm = 0;
    for (size_t i = first; i < x.size(); ++i) {
        error += (x[i] - truth[i]) * (x[i] - truth[i]);
        norm += truth[i] * truth[i];
    }
    return std::isnan(error) ? INFINITY : std::sqrt(error / std::max(norm, 1e-300));
}

// Formulas by both paths, against tiles in float64. Returns whether all are near it.
bool check_all(const std::vector<Shape>& shapes, const std::vector<FormulaInfo>& formulas) {
    bool right = true;
    const auto check = [&](const Shape& shape, const FormulaInfo& formula, bool mining, Kind kind,
                           bool matrix, const std::vector<double>& truth) {
        const Batch batch(kind, shape, formula, mining);
        const Call call(batch, matrix);
        const std::vector<double> found = call.results();
        const double loss = std::fabs(found[0] - truth[0]) / std::max(std::fabs(truth[0]), 1.0);
        const double gradient = relative_error(found, truth, 1);
        const double near = kind == Kind::kFloat64 ? 1e-11 : kind == Kind::kFloat32 ? 2e-5 : 3e-2;
        const bool repeated = call.results() == found;
        const bool good = loss < near && gradient < near && repeated;
        right = right && good;
        std::printf(
            "{\"check\": \"%s\", \"path\": \"%s\", \"wgmma\": %d, \"mining\": %d, \"n\": %lld, \"m\": %lld, "
            "\"dim\": %lld, \"type\": \"%s\", \"loss_error\": %.3g, \"gradient_error\": %.3g, \"repeated\": "
            "%d, "
            "\"good\": %d}\n",
            std::string(formula.name).c_str(), matrix ? "matrix" : "tiles", asks_for_wgmma(), mining,
            (long long)shape.n, (long long)shape.m, (long long)shape.dim, kKindNames[int(kind)], loss,
            gradient, repeated, good);
    };
    for (const Shape& shape : shapes) {
        for (const FormulaInfo& formula : formulas) {
            for (const bool mining : {false, true}) {
                const std::vector<double> truth =
                    Call(Batch(Kind::kFloat64, shape, formula, mining), false).results();
                for (int kind = 0; kind <= int(Kind::kFloat64); ++kind) {
                    for (const bool matrix : {true, false})
                        check(shape, formula, mining, Kind(kind), matrix, truth);
                }
            }
        }
    }
    return right;
}

// Multi-similarity with mining, by the matrix path and by tiles.
void time_all(const std::vector<Shape>& shapes) {
    const Stream own;
    for (const Shape& shape : shapes) {
        for (const Kind kind : {Kind::kFloat32, Kind::kTf32, Kind::kBFloat16}) {
            const Batch batch(kind, shape, formula_named("multi_similarity"), true);
            for (const bool matrix : {true, false}) {
                const Call call(batch, matrix);
                const double forward = time_of(own.stream, [&] { call.forward(own.stream); });
                const double backward = time_of(own.stream, [&] { call.backward(own.stream); });
                std::printf(
                    "{\"times\": \"%s\", \"dependent\": %d, \"wgmma\": %d, \"n\": %lld, \"m\": %lld, "
                    "\"dim\": %lld, "
                    "\"type\": \"%s\", \"forward_us\": %.2f, \"backward_us\": %.2f}\n",
                    matrix ? "matrix" : "tiles", asks_for_dependent_launches(), asks_for_wgmma(),
                    (long long)shape.n, (long long)shape.m, (long long)shape.dim, kKindNames[int(kind)],
                    forward, backward);
                std::fflush(stdout);
            }
        }
    }
}

// ---- constants of the hardware ---------------------------------------------------------------------------

__global__ void __launch_bounds__(256) do_nothing(unsigned*) {
    wait_for_previous_kernel();
    let_next_kernel_start();
}

__global__ void __launch_bounds__(256) draw_tickets(unsigned* tickets) {
    block_sync();
    if (threadIdx.x == 0) take_ticket(tickets);
}

// So many instructions, each executed once.
template <int Count>
__global__ void __launch_bounds__(256) run_cold_code(unsigned* out) {
    unsigned x = threadIdx.x, y = blockIdx.x;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
        x = x * 1664525u + y;
        y ^= x;
    }
    if (x + y == 0xdeadbeef) *out = x;
}

// Reads `count` numbers by all blocks together, `rounds` times.
__global__ void __launch_bounds__(256) read_all(const uint4* from, int64_t count, int rounds, unsigned* out) {
    unsigned sum = 0;
    for (int round = 0; round < rounds; ++round) {
#pragma unroll 8
        for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < count; i += int64_t(gridDim.x) * 256)
            sum += from[i].x ^ unsigned(round);
    }
    if (sum == 0xdeadbeef) *out = sum;
}

void measure_constants() {
    const Stream own;
    const Array<unsigned> word(std::vector<unsigned>(4, 0));
    const int64_t chunks = kOnHost ? 1 << 10 : 1 << 20;  // 16 MiB
    const Array<uint4> memory(std::vector<uint4>(size_t(chunks), uint4{1, 2, 3, 4}));
    const unsigned blocks = unsigned(device_limits().multiprocessors);
    const auto report = [&](const char* name, const std::function<void()>& call) {
        std::printf("{\"constant\": \"%s\", \"us\": %.2f}\n", name, time_of(own.stream, call));
        std::fflush(stdout);
    };
    const auto run = [&](void (*kernel)(unsigned*), int times) {
        for (int k = 0; k < times; ++k) launch(kernel, dim3(blocks), dim3(256), 0, own.stream, word.get());
    };
    report("one empty kernel", [&] { run(do_nothing, 1); });
    report("eleven empty kernels", [&] { run(do_nothing, 11); });
    report("eleven empty kernels, ten of them dependent", [&] {
        Launches launches(own.stream);
        for (int k = 0; k < 11; ++k) launches(do_nothing, dim3(blocks), dim3(256), 0, word.get());
    });
    report("one ticket a block", [&] { run(draw_tickets, 1); });
    report("cold code, 250", [&] { run(run_cold_code<125>, 1); });
    report("cold code, 1000", [&] { run(run_cold_code<500>, 1); });
    report("cold code, 4000", [&] { run(run_cold_code<2000>, 1); });
    for (const int rounds : {1, 11}) {
        const std::string name = "read 16 MiB " + std::to_string(rounds) + " times";
        report(name.c_str(), [&] {
            launch(read_all, dim3(8 * blocks), dim3(256), 0, own.stream, memory.get(), chunks, rounds,
                   word.get());
        });
    }
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<std::string> asked(arguments + 1, arguments + count);
    const auto begins_with = [&](const char* option, const char* variable) {
        if (asked.empty() || asked.front() != option) return;
        setenv(variable, "1", 1);
        asked.erase(asked.begin());
    };
    begins_with("dependent", "DML_CUDA_DEPENDENT_LAUNCH");
    begins_with("wgmma", "DML_CUDA_WGMMA");
#if defined(DML_CUDA_ON_HOST)
    if (asks_for_wgmma()) emulator::device() = {4, 227 * 1024, 90};
#endif
    const auto wants = [&](const char* part) {
        return asked.empty() || std::find(asked.begin(), asked.end(), part) != asked.end();
    };
    try {
        if (wants("constants")) measure_constants();
        bool right = true;
        const std::vector<Shape> small = {{70, 0, 24}, {40, 90, 136}},
                                 large = {{70, 0, 24}, {512, 0, 128}, {300, 700, 136}, {1500, 0, 64}};
        if (wants("check"))
            right = check_all(kOnHost ? small : large, {std::begin(kFormulas), std::end(kFormulas)});
        if (!asked.empty() && wants("cases"))
            right = check_all(small, {formula_named("multi_similarity"), formula_named("nt_xent")}) && right;
        if (wants("times")) {
            if (kOnHost) {
                time_all({{40, 0, 16}});
            } else {
                time_all({{128, 0, 128},
                          {512, 0, 128},
                          {512, 0, 512},
                          {1024, 0, 512},
                          {2048, 0, 512},
                          {512, 10'000, 128},
                          {4096, 0, 512},
                          {8192, 0, 512}});
            }
        }
        return right ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
