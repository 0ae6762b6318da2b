// Runs tiles whose parameters learn, forward and twice backward, and writes loss and gradients to stdout: every bug
// that test_tile_planted_bugs.py plants in the kernels shows. Of float32; with the argument `wgmma` by wgmma, and of
// bfloat16 as well.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda/pairs/engine.cuh"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

void write(const Buffer& numbers, int64_t bytes) {
    std::fwrite(numbers.data.get(), 1, size_t(bytes), stdout);
}

template <typename Math>
void run(int64_t n, int64_t m, int64_t dim, Similarity similarity, const Tuning& tuning) {
    constexpr FormulaId kFormula = FormulaId::multi_similarity;
    using T = typename Math::Value;
    const Cloud<T> queries(n, dim, dim), refs(std::max<int64_t>(m, 1), dim, dim);
    const int params = kFormulas[int(kFormula)].params;
    const Buffer values(params * int64_t(sizeof(double)));
    std::copy_n(kParams[int(kFormula)], params, values.as<double>());
    Task task;
    task.tuning = tuning;
    Problem& p = task.problem;
    p = problem_of(queries, refs, m, dim, kFormula, similarity);
    p.mining = {true, 0.1};
    const int64_t by_params_bytes = (params + 1) * int64_t(sizeof(double)),
                  query_bytes = n * dim * int64_t(sizeof(T)), ref_bytes = m * dim * int64_t(sizeof(T));
    const Buffer by_params = poisoned(by_params_bytes);
    task.learned = {params, values.as<double>(), by_params.as<double>()};
    const Buffer saved = poisoned(Engine<Math>::saved_bytes(task));
    const Buffer loss = poisoned(sizeof(float));
    const Buffer forward_space = poisoned(Engine<Math>::forward_workspace_bytes(task));
    Engine<Math>::forward(task, true, saved.data.get(), loss.data.get(), forward_space.data.get(), nullptr);
    write(loss, sizeof(float));
    const float upstream = 1.0f;
    for (const bool of_points : {true, false}) {
        std::memset(by_params.data.get(), 0xff, size_t(by_params_bytes));
        const Buffer of_queries = poisoned(query_bytes), of_refs = poisoned(ref_bytes);
        const Buffer backward_space = poisoned(Engine<Math>::backward_workspace_bytes(task));
        Engine<Math>::backward(task, saved.data.get(), &upstream, of_points ? of_queries.data.get() : nullptr,
                               of_points && m > 0 ? of_refs.data.get() : nullptr, backward_space.data.get(),
                               nullptr);
        write(by_params, by_params_bytes);
        if (!of_points) continue;
        write(of_queries, query_bytes);
        write(of_refs, ref_bytes);
    }
}

}  // namespace

int main(int count, char**) {
    return watched([&] {
        Tuning whole;
        whole.matrix_bytes = 0;
        whole.wgmma = count > 1;
        if (whole.wgmma) emulator::device() = {4, 227 * 1024, 90};
        Tuning groups = whole;  // of tiles, and parts of lines
        groups.tile_group = 2;
        groups.cache_bytes = 0;
        groups.split_slots = 1;
        const Similarity cosine, raw = {true, false};
        using Float = ScaledMath<2>;
        if (whole.wgmma) {
            run<Float>(300, 0, 136, cosine, whole);
            run<HalfMath<__nv_bfloat16>>(300, 0, 8, cosine, whole);
            run<HalfMath<__nv_bfloat16>>(140, 270, 8, cosine, groups);
            return;
        }
        run<Float>(300, 0, 8, cosine, whole);
        run<Float>(300, 0, 8, cosine, groups);
        run<Float>(140, 270, 8, cosine, whole);
        run<Float>(140, 270, 8, raw, groups);  // which sums the weights of lines
    });
}
