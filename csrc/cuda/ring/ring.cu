// Chooses the kernels for a block's type.
#include "cuda/ring/ring.cuh"

namespace dml::cuda {

extern template struct BlockEngine<SimtMath<double>>;
extern template struct BlockEngine<Tf32Math<float, true>>;
extern template struct BlockEngine<Tf32Math<float, false>>;
extern template struct BlockEngine<HalfMath<__half>>;
extern template struct BlockEngine<HalfMath<__nv_bfloat16>>;

namespace {

template <typename F>
auto with_engine(const Task& task, const F& f) {
    switch (task.problem.scalar) {
        case Scalar::kFloat64:
            return f(BlockEngine<SimtMath<double>>());
        case Scalar::kFloat16:
            return f(BlockEngine<HalfMath<__half>>());
        case Scalar::kBFloat16:
            return f(BlockEngine<HalfMath<__nv_bfloat16>>());
        case Scalar::kFloat32:
            break;
    }
    switch (task.precision) {
        case Precision::kTf32:
            return f(BlockEngine<Tf32Math<float, false>>());
        case Precision::kFull:
            break;
    }
    return f(BlockEngine<Tf32Math<float, true>>());
}

}  // namespace

BlockSizes block_sizes(const Task& task) {
    return with_engine(task, [&](auto engine) { return engine.sizes(task); });
}

void add_block(const Task& task, BlockStage stage, void* state, void* extremes, void* kept, void* workspace,
               cudaStream_t stream) {
    with_engine(task,
                [&](auto engine) { engine.add(task, stage, state, extremes, kept, workspace, stream); });
}

void block_backward(const Task& task, const void* weights, const void* grad_parts, const void* kept,
                    void* grad_rows, void* grad_block, void* workspace, cudaStream_t stream) {
    with_engine(task, [&](auto engine) {
        engine.backward(task, weights, grad_parts, kept, grad_rows, grad_block, workspace, stream);
    });
}

const BlockEntryPoints kBlockEntryPoints = {block_sizes, turn_rows, add_block, finish_rows, block_backward};

}  // namespace dml::cuda
