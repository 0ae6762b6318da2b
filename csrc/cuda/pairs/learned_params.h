// The launches around parameters that learn, which read no points: they are compiled once for float and double
// (instantiations/learned_params.cu), not for each arithmetic.
#pragma once

#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/row_stats.cuh"

namespace dml::cuda {

template <typename Acc>
struct Learned {
    // Makes the formula of the parameters' values; nothing where none learns.
    static void make(const Task& task, cudaStream_t stream);
    // The gradient by the parameters, where forward has summed what they do to terms.
    static void reduce(const Task& task, const RowStats<Acc>& row_stats, const Acc* grad_loss,
                       cudaStream_t stream);
};
extern template struct Learned<float>;
extern template struct Learned<double>;

}  // namespace dml::cuda
