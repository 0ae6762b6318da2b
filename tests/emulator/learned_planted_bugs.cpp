// Runs tiles of float32 whose parameters learn, forward and twice backward, and writes the gradients by parameters
// to stdout: every bug that test_learned_params_emulated.py plants in the kernels shows.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda/pairs/engine.cuh"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

using Math = ScaledMath<2>;

void run(int64_t n, int64_t m) {
    constexpr int64_t kDim = 8;
    constexpr FormulaId kFormula = FormulaId::multi_similarity;
    const Cloud<float> queries(n, kDim, kDim), refs(std::max<int64_t>(m, 1), kDim, kDim);
    const int params = kFormulas[int(kFormula)].params;
    const Buffer values(params * int64_t(sizeof(double)));
    std::copy_n(kParams[int(kFormula)], params, values.as<double>());
    Task task;
    task.tuning.matrix_bytes = 0;
    task.tuning.tile_group = 2;  // several groups
    Problem& p = task.problem;
    p.queries = queries.view;
    p.square = m == 0;
    p.refs = p.square ? p.queries : refs.view;
    p.dim = kDim;
    p.formula = kFormula;
    p.mining = {true, 0.1};
    const int64_t gradient_bytes = (params + 1) * int64_t(sizeof(double));
    const Buffer gradient = poisoned(gradient_bytes);
    task.learned = {params, values.as<double>(), gradient.as<double>()};
    const Buffer saved = poisoned(Engine<Math>::saved_bytes(task));
    const Buffer loss = poisoned(sizeof(float));
    const Buffer forward_space = poisoned(Engine<Math>::forward_workspace_bytes(task));
    Engine<Math>::forward(task, true, saved.data.get(), loss.data.get(), forward_space.data.get(), nullptr);
    const float upstream = 1.0f;
    for (int again = 0; again < 2; ++again) {
        std::memset(gradient.data.get(), 0xff, size_t(gradient_bytes));
        const Buffer backward_space = poisoned(Engine<Math>::backward_workspace_bytes(task));
        Engine<Math>::backward(task, saved.data.get(), &upstream, nullptr, nullptr, backward_space.data.get(),
                               nullptr);
        std::fwrite(gradient.data.get(), 1, size_t(gradient_bytes), stdout);
    }
}

}  // namespace

int main() {
    return watched([] {
        run(300, 0);
        run(140, 270);
    });
}
