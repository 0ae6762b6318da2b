// Launches the kernels around parameters that learn.
#include "cuda/common/launch.h"
#include "cuda/pairs/learned_params.cuh"
#include "cuda/pairs/learned_params.h"
#include "cuda/pairs/task_arguments.cuh"

namespace dml::cuda {

template <typename Acc>
void Learned<Acc>::make(const Task& task, Launches& launches) {
    const LearnedParams& learned = task.learned;
    if (learned.count == 0) return;
    launches(make_formula<Acc>, dim3(1), dim3(kMakeThreads), 0, task.problem.formula, learned.values,
             learned.made, learned.ticket());
}

template <typename Acc>
void Learned<Acc>::reduce(const Task& task, const RowStats<Acc>& row_stats, const Acc* grad_loss,
                          Launches& launches) {
    const LearnedParams& learned = task.learned;
    launches(reduce_by_params<Acc>, dim3(unsigned(learned.count + 1)), dim3(kReduceThreads),
             kReduceSharedBytes, rows_by_params<Acc>(task), learned.count, row_stats,
             upstream_of(task, grad_loss), learned.gradient);
}

template struct Learned<float>;
template struct Learned<double>;

}  // namespace dml::cuda
