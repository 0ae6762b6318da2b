// The ops on classes with several centres on CPUs: rows on all threads, the loops of cpu/kernels/center_kernels.h.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <vector>

#include "cpu/kernels/center_kernels.h"
#include "cpu/tasks.h"
#include "torch/center_ops.h"

namespace dml::cpu {
namespace {

using at::Tensor;

struct CenterKernelsOnCpu {
    struct Guard {
        explicit Guard(c10::Device) {}
    };

    template <typename T>
    static Tensor inverse_lengths(const Tensor& points) {
        const Tensor length = at::linalg_vector_norm(points, 2, at::IntArrayRef({1}));
        return length.reciprocal().masked_fill_(length <= kTinyNorm, 0);
    }

    template <typename T>
    static void through_norm(Tensor& gradient, const Tensor& points, const Tensor& inverse) {
        const Tensor along = (gradient * points).sum(1).mul_(inverse).mul_(inverse);
        gradient.addcmul_(points, along.unsqueeze(1), -1);
    }

    // Calls run(row, scratch) for all rows.
    template <typename T, typename Run>
    static void for_rows(const CenterBlock<T>& block, const Run& run) {
        constexpr int64_t kStepsPerCentre = 8;
        const int64_t work = block.rows * block.classes * block.per_class * kStepsPerCentre;
        for_tasks(block.rows, work, [&](int64_t row) {
            static thread_local std::vector<T> scratch;
            scratch.resize(kCenterChunk * block.per_class);
            run(row, scratch.data());
        });
    }

    template <typename T>
    static void forward(const CenterBlock<T>& block, CenterLoss loss, const CenterParams& params,
                        CenterRow<T>* rows, T* losses, T* saved) {
        const auto run = center_kernels<T>().forward[static_cast<int>(loss)];
        for_rows(block, [&](int64_t row, T* scratch) {
            const auto of_rows = SavedCenters<T>::at(saved, block.rows);
            if (!block.has_class(row)) {
                losses[row] = T(0);
                of_rows.put_nothing(row);
                return;
            }
            CenterRow<T> state = block.is_first() ? CenterRow<T>{{}, T(0)} : rows[row];
            run(block, params, row, scratch, state);
            rows[row] = state;
            if (!block.is_last()) return;
            const CenterResult<T> result(state);
            losses[row] = result.loss;
            of_rows.put(row, result);
        });
    }

    template <typename T>
    static void backward(const CenterBlock<T>& block, CenterLoss loss, const CenterParams& params,
                         const T* grad, const T* saved, double* by_params) {
        const auto run = center_kernels<T>().backward[static_cast<int>(loss)];
        for_rows(block, [&](int64_t row, T* scratch) {
            const int64_t width = block.classes * block.per_class;
            if (!block.has_class(row)) {
                std::fill_n(block.s + row * width, width, T(0));
                return;
            }
            run(block, params, row, scratch, grad[row], SavedCenters<const T>::at(saved, block.rows),
                by_params ? by_params + row * kCenterParams : nullptr);
        });
    }
};

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) {
    m.impl("center_softmax", &center_softmax<CenterKernelsOnCpu>);
    m.impl("center_softmax_backward", &center_softmax_backward<CenterKernelsOnCpu>);
}

}  // namespace dml::cpu
