// Runs the kernels on listed pairs for the sanitizers to watch, with indices far out of range among the good
// ones: each array is a heap block of exactly its size.
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cuda/indexed/listed_pairs.cuh"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

template <typename T>
void run(int64_t n, int64_t m, int64_t dim) {
    const std::vector<T> x(n * dim, T(0.5)), y(m * dim, T(2));
    std::vector<int64_t> rows, cols, offsets = {0};
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k < i % 5; ++k) {
            rows.push_back(i);
            cols.push_back((7 * i + k) % m);
        }
        offsets.push_back(int64_t(rows.size()));
    }
    rows.back() = n;
    cols[0] = -1;
    cols[1] = int64_t(1) << 62;
    offsets[3] = int64_t(1) << 62;
    const auto pairs = int64_t(rows.size());
    const Segments segments = {offsets.data(), n, pairs};
    std::vector<T> products(pairs), sums(n * dim), logs(n);
    const PointList<T> points = {x.data(), n, dim}, others = {y.data(), m, dim};
    multiply_pairs(points, others, rows.data(), cols.data(), pairs, products.data(), nullptr);
    sum_pairs(products.data(), others, cols.data(), segments, sums.data(), nullptr);
    log_sum_exps(products.data(), segments, true, logs.data(), nullptr);
    if (products[2] != T(dim) || !std::isnan(products[0]) || !std::isnan(products.back()))
        throw std::runtime_error("wrong products");
    if (!std::isnan(sums[2 * dim]) || !std::isnan(logs[3])) throw std::runtime_error("wrong sums");
}

}  // namespace

int main() {
    return watched([] {
        run<float>(30, 20, 128);
        run<float>(30, 20, 133);
        run<double>(30, 20, 33);
        run<double>(30, 20, 64);
    });
}
