// The launches around parameters that learn, which read no points: they are compiled once for float and double
// (instantiations/learned_params.cu), not for each arithmetic.
#pragma once

#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/row_stats.cuh"

namespace dml::cuda {

template <typename Acc>
struct Learned {
    // Makes the formula of the parameters' values; nothing where none learns.
    static void make(const Task& task, Launches& launches);
    // The gradient by the parameters, where forward has summed what they do to terms.
    static void reduce(const Task& task, const RowStats<Acc>& row_stats, const Acc* grad_loss,
                       Launches& launches);
};
extern template struct Learned<float>;
extern template struct Learned<double>;

// The task with its formula made at the beginning of the workspace, which is advanced; unchanged where no
// parameter learns.
template <typename Acc>
Task with_made_formula(Task task, unsigned char*& workspace, Launches& launches) {
    if (task.learned.count == 0) return task;
    task.learned.made = workspace;
    workspace += learned_bytes<int64_t>(0, task.learned.count, sizeof(Acc));
    Learned<Acc>::make(task, launches);
    return task;
}

}  // namespace dml::cuda
