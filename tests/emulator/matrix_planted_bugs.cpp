// Runs the matrix path of float32, forward and backward, and writes losses and gradients to stdout: batches in
// which each bug that test_matrix_emulated.py plants in the kernels shows.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "cuda/matrix/engine.cuh"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

using Math = Tf32Math<float, true>;
constexpr int64_t kDim = 8;

// Points at angles in a plane.
struct Plane {
    std::vector<float> points;
    std::vector<int64_t> labels;

    void add(double angle, int64_t label) {
        points.insert(points.end(), kDim, 0.0f);
        points[points.size() - kDim] = float(std::cos(angle));
        points[points.size() - kDim + 1] = float(std::sin(angle));
        labels.push_back(label);
    }
    Points view() const { return {points.data(), kDim, labels.data(), int64_t(labels.size())}; }
};

void run(const Plane& queries, const Plane* refs, int64_t num_valid_refs, bool is_whole) {
    Task task;
    task.tuning.whole_line = is_whole ? 1024 : 0;
    task.tuning.small_tile_pairs = is_whole ? 1 << 19 : 0;
    Problem& p = task.problem;
    p.queries = queries.view();
    p.square = refs == nullptr;
    p.refs = refs ? refs->view() : p.queries;
    p.num_valid_refs = refs ? &num_valid_refs : nullptr;
    p.dim = kDim;
    p.formula = FormulaId::multi_similarity;
    std::copy_n(kParams[int(p.formula)], 3, p.params);
    p.mining = {true, 0.01};
    const MatrixEngine<Math> engine = {task};
    const int64_t n = p.queries.count, m = p.refs.count;
    const Buffer saved = poisoned(MatrixSizes<int64_t>(n, m, p.square, sizeof(float)).bytes);
    const Buffer forward_space = poisoned(engine.forward_workspace_bytes());
    const Buffer backward_space = poisoned(engine.backward_workspace_bytes());
    const Buffer loss = poisoned(sizeof(float)), of_queries = poisoned(n * kDim * int64_t(sizeof(float))),
                 of_refs = poisoned(m * kDim * int64_t(sizeof(float)));
    const float upstream = 1.0f;
    Launches in_forward(nullptr), in_backward(nullptr);
    engine.forward(true, saved.data.get(), loss.as<float>(), forward_space.data.get(), in_forward);
    engine.backward(saved.data.get(), &upstream, of_queries.as<float>(), refs ? of_refs.as<float>() : nullptr,
                    backward_space.data.get(), in_backward);
    std::fwrite(loss.data.get(), sizeof(float), 1, stdout);
    std::fwrite(of_queries.data.get(), sizeof(float), size_t(n * kDim), stdout);
    if (refs) std::fwrite(of_refs.data.get(), sizeof(float), size_t(m * kDim), stdout);
}

}  // namespace

int main() {
    return watched([] {
        // 64 rows whose positives are far keep the 64 rows between them; those, in pairs of equal points and
        // far from each other, keep nothing. The last 64 are far from all.
        Plane square;
        for (int i = 0; i < 64; ++i) square.add(i % 2 ? 0.5 : -0.5, i / 2);
        for (int i = 0; i < 64; ++i) square.add(0.3 * (i / 2 % 3 - 1), 100 + i / 2 % 3);
        for (int i = 0; i < 64; ++i) square.add(3.0, 200);
        // The second half of the references is not filled yet.
        Plane rows, refs;
        for (int i = 0; i < 40; ++i) rows.add(0.03 * i, i % 5);
        for (int i = 0; i < 60; ++i) refs.add(0.02 * i + 0.01, i % 5);
        std::fill(refs.points.begin() + 30 * kDim, refs.points.end(),
                  std::numeric_limits<float>::quiet_NaN());
        for (const bool is_whole : {true, false}) {
            run(square, nullptr, 0, is_whole);
            run(rows, &refs, 30, is_whole);
        }
    });
}
