// Runs the kernels on classes with several centres and writes what they fill to stdout: for the sanitizers to watch, and
// with cases in which each bug that test_centers_emulated.py plants in them shows.
#include <cmath>
#include <vector>

#include "cuda/centers/centers.h"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

template <typename T>
std::vector<T> numbers(int64_t count, double step, double low, double high) {
    std::vector<T> values(count);
    for (int64_t k = 0; k < count; ++k)
        values[k] = T(low + (high - low) * (0.5 + 0.5 * std::sin(step * double(k * k % 1009))));
    return values;
}

template <typename T>
void show(const std::vector<T>& values) {
    std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// Classes in two blocks. Rows have the first class, the last, one in between, and none.
template <typename T>
void run(CenterLoss loss, int64_t classes, int64_t per_class, bool learned) {
    const std::vector<int64_t> labels = {0, classes - 1, classes / 2, -1, classes};
    const int64_t rows = int64_t(labels.size()), cut = classes / 3;
    const std::vector<double> values = loss == CenterLoss::kSoftTriple
                                           ? std::vector<double>{8, 0.2, 0.1}
                                           : std::vector<double>{8, std::cos(0.5), std::sin(0.5)};
    CenterParams params = {};
    std::copy(values.begin(), values.end(), params.numbers);
    if (learned) params.in_memory = values.data();
    const std::vector<T> row_inverse = numbers<T>(rows, 0.3, 0.5, 1), grad = numbers<T>(rows, 0.7, -1, 1);
    std::vector<T> losses(rows, T(NAN)), saved(3 * rows, T(NAN));
    std::vector<CenterRow<T>> states(rows, CenterRow<T>{{T(NAN), T(NAN)}, T(NAN)});
    std::vector<double> by_params(kCenterParams * rows);
    for (const bool backward : {false, true}) {
        for (const bool second : {false, true}) {
            const int64_t first = second ? cut : 0, count = second ? classes - cut : cut;
            std::vector<T> s = numbers<T>(rows * count * per_class, second ? 0.37 : 0.53, -0.9, 0.9);
            const std::vector<T> inverse = numbers<T>(count * per_class, 0.11, 0.8, 1.1);
            const CenterBlock<T> block = {s.data(),           rows,           count,
                                          per_class,          first,          classes,
                                          row_inverse.data(), inverse.data(), labels.data()};
            if (backward) {
                center_weights(block, loss, params, grad.data(), saved.data(),
                               learned ? by_params.data() : nullptr, nullptr);
                show(s);
            } else {
                center_losses(block, loss, params, states.data(), losses.data(), saved.data(), nullptr);
            }
        }
    }
    show(losses);
    show(saved);
    show(by_params);
}

// Points as rows and as columns, of which one is 0.
void lengths() {
    constexpr int64_t kCount = 70, kDim = 19;
    std::vector<double> points = numbers<double>(kCount * kDim, 0.21, -1, 1);
    for (const bool columns : {false, true}) {
        const int64_t row = columns ? 1 : kDim, col = columns ? kCount : 1;
        for (int64_t d = 0; d < kDim; ++d) points[3 * row + d * col] = 0;
        std::vector<double> inverse(kCount), gradient = numbers<double>(kCount * kDim, 0.17, -1, 1);
        const StridedPoints<const double> view = {points.data(), kCount, kDim, row, col};
        inverse_lengths(view, 1e-12, inverse.data(), nullptr);
        through_norm<double>({gradient.data(), kCount, kDim, kDim, 1}, view, inverse.data(), nullptr);
        show(inverse);
        show(gradient);
    }
}

}  // namespace

int main() {
    return watched([] {
        for (const CenterLoss loss : {CenterLoss::kSoftTriple, CenterLoss::kSubCenters}) {
            run<double>(loss, 5, 3, true);
            run<float>(loss, 400, 3, false);    // more than a tile in each block
            run<double>(loss, 5, 5300, false);  // more centres than can be staged
        }
        lengths();
    });
}
