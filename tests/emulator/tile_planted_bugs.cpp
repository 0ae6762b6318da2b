// Runs tiles of float32 whose parameters learn, forward and twice backward, and writes loss and gradients to
// stdout: every bug that test_tile_planted_bugs.py plants in the kernels shows.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda/pairs/engine.cuh"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

using Math = ScaledMath<2>;
constexpr int64_t kDim = 8;

void write(const Buffer& numbers, int64_t bytes) {
    std::fwrite(numbers.data.get(), 1, size_t(bytes), stdout);
}

void run(int64_t n, int64_t m, Similarity similarity, const Tuning& tuning) {
    constexpr FormulaId kFormula = FormulaId::multi_similarity;
    const Cloud<float> queries(n, kDim, kDim), refs(std::max<int64_t>(m, 1), kDim, kDim);
    const int params = kFormulas[int(kFormula)].params;
    const Buffer values(params * int64_t(sizeof(double)));
    std::copy_n(kParams[int(kFormula)], params, values.as<double>());
    Task task;
    task.tuning = tuning;
    Problem& p = task.problem;
    p = problem_of(queries, refs, m, kDim, kFormula, similarity);
    p.mining = {true, 0.1};
    const int64_t by_params_bytes = (params + 1) * int64_t(sizeof(double)),
                  query_bytes = n * kDim * int64_t(sizeof(float)),
                  ref_bytes = m * kDim * int64_t(sizeof(float));
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

int main() {
    return watched([] {
        Tuning whole;
        whole.matrix_bytes = 0;
        Tuning groups = whole;  // of tiles, and parts of lines
        groups.tile_group = 2;
        groups.cache_bytes = 0;
        groups.split_slots = 1;
        const Similarity cosine, raw = {true, false};
        run(300, 0, cosine, whole);
        run(300, 0, cosine, groups);
        run(140, 270, cosine, whole);
        run(140, 270, raw, groups);  // which sums the weights of lines
    });
}
