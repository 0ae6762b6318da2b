// Backward of the matrix path: a product that knows no loss. With u_ij = dL_i/ds_ij as forward stored it and
// f_i the upstream gradient of row i,
//
//   G_i = sum_j (f_i u_ij + f_j u_ji) x_j     both terms where rows and columns are the same points,
//                                             else the first for queries, the second for references
//
// then projected through the normalisation. A block owns `kRows` rows; it sums over the *line*, the points
// that they were compared with, and passes over chunks of it that forward left empty. Few dimensions: all of
// them, and the projection in the same launch. More: a panel of them, of a part of the line; a second kernel
// adds the parts and projects.
#pragma once

#include "cuda/matrix/saved_matrix.cuh"
#include "cuda/pairs/finish_gradient.cuh"
#include "cuda/pairs/list_slots.cuh"
#include "cuda/pairs/product_shape.cuh"

namespace dml::cuda {

inline constexpr int kGradientCols = 128;  // dimensions of a block
inline constexpr int kMostListed = 512;    // chunks of a line at once

// The type that weights are stored in: what a product in GradMath would round them to anyway.
template <typename GradMath>
struct WeightOf {
    using Type = typename GradMath::Acc;
};
template <typename T>
struct WeightOf<HalfMath<T>> {
    using Type = T;
};
template <typename T>
struct WeightOf<Tf32Math<T, false>> {
    using Type = RoundedToTf32;
};

template <typename GradMath, bool kWhole>
struct MatrixGradientTraits {
    using T = typename GradMath::Value;
    using Acc = typename GradMath::Acc;
    using Weight = typename WeightOf<GradMath>::Type;
    static constexpr int kRows = kWhole ? 16 : 64, kCols = kGradientCols;
    using TileShape = Shape<kRows, kCols, kWhole ? 1 : 2, kWhole ? 8 : 4, true>;
    static constexpr int kThreads = TileShape::kThreads;
    static constexpr int kStages = kWhole ? 4 : 3;
    static constexpr int kBytesAlong = kWhole ? 128 : 64;
    static constexpr int kDepth = kBytesAlong / int(sizeof(T)) < 32 ? kBytesAlong / int(sizeof(T)) : 32;
    // A stage: derivatives of the block's rows, of the line's rows, and the line's points.
    static constexpr int kPitch = kDepth + kPad<Acc>, kAcrossPitch = kRows + kPad<Acc>;
    static constexpr int kPointPitch = kCols + (sizeof(T) == 8 ? 2 : sizeof(T) < sizeof(Weight) ? 16 : 8);
    static constexpr int kAcross = kRows * kPitch * int(sizeof(Acc));
    static constexpr int kPoints = kAcross + kDepth * kAcrossPitch * int(sizeof(Acc));
    static constexpr int kStageBytes = kPoints + kDepth * kPointPitch * int(sizeof(T));
    // Weights of the slice in use; of each row of the block its factors, label and sum of weights; the list.
    static constexpr int kWeightPitch = kDepth + kPad<Weight>;
    static constexpr int kSumPitch = kCols + kPad<Acc>;  // of the block's sums, in place of the stages
    static constexpr int kSums = kRows * kSumPitch * int(sizeof(Acc));
    static constexpr int kStagesBytes = kStages * kStageBytes;
    static constexpr int kWeights = kStagesBytes;
    static constexpr int kLabels = kWeights + kRows * kWeightPitch * int(sizeof(Weight));
    static constexpr int kFactors = kLabels + kRows * int(sizeof(int64_t));
    static constexpr int kWeightSums = kFactors + 2 * kRows * int(sizeof(Acc));
    static constexpr int kPresent = kWeightSums + kRows * int(sizeof(Acc));
    static constexpr int kList = kPresent + kMostListed;
    static constexpr int kSharedBytes = kList + (kMostListed + 1) * int(sizeof(int));
    static_assert(kChunk % kDepth == 0 && kChunk % kRows == 0, "slices and rows of one chunk");
    static_assert(!kWhole || kSums <= kStagesBytes, "sums take the place of the stages");
    static_assert(kSharedBytes <= 99 * 1024, "what every GPU from sm_80 on grants");
};

// One side whose gradient is wanted.
template <typename T, typename Acc>
struct GradientSide {
    Rows<T, Acc> rows, line;
    bool along, across;  // are the rows of the matrix their own, are those of the line: whose losses count
    int64_t begin, end;  // of the rows
    int parts;           // of the line, each by a block of its own
    Acc* first;          // [end - begin, dim] sums of part 0
    Acc* others;         // [parts - 1, end - begin, dim]
    Acc* weight_sums;    // [parts, end - begin], for distances of rows that are not normalised
    T* grad;             // [rows, dim]

    DML_INLINE Acc* sums(int part, int64_t dim) const {
        return part == 0 ? first : others + (part - 1) * (end - begin) * dim;
    }
};

template <typename T, typename Acc>
struct MatrixGradientTask {
    GradientSide<T, Acc> sides[2];
    unsigned blocks[2];  // of each side
    SavedMatrix<Acc> saved;
    Similarity similarity;
    Upstream<Acc> upstream;

    DML_DEVICE RowStats<Acc> row_stats() const {
        RowStats<Acc> stats = {};
        stats.header = saved.header;
        return stats;
    }
    DML_DEVICE bool two_parts() const { return upstream.last_part > 0; }
    DML_DEVICE bool sums_weights() const { return similarity.euclidean && !similarity.normalize; }
};

template <typename GradMath, bool kWhole>
struct MatrixGradientBlock {
    using Traits = MatrixGradientTraits<GradMath, kWhole>;
    using T = typename Traits::T;
    using Acc = typename Traits::Acc;
    using Weight = typename Traits::Weight;
    using Sum = Product<GradMath, typename Traits::TileShape>;
    static constexpr int kRows = Traits::kRows, kDepth = Traits::kDepth, kThreads = Traits::kThreads;
    static constexpr int kRowStep = kThreads / kDepth, kRowsOfThread = kRows / kRowStep;
    static_assert(kThreads % kDepth == 0 && kRows % kRowStep == 0 && kDepth <= kWarpSize, "even shares");

    const MatrixGradientTask<T, Acc>& task;
    const GradientSide<T, Acc>& side;
    int64_t row0, rows, line;  // rows and points of the line that are in use
    Acc weight_sums[kRowsOfThread] = {};

    static DML_DEVICE unsigned char* stage(int s) {
        return shared_array<unsigned char>(0, Traits::kStagesBytes) + s * Traits::kStageBytes;
    }
    static DML_DEVICE Acc* along_of(int s) { return reinterpret_cast<Acc*>(stage(s)); }
    static DML_DEVICE Acc* across_of(int s) { return reinterpret_cast<Acc*>(stage(s) + Traits::kAcross); }
    static DML_DEVICE T* points_of(int s) { return reinterpret_cast<T*>(stage(s) + Traits::kPoints); }
    static DML_DEVICE Weight* weights() {
        return shared_array<Weight>(Traits::kWeights, kRows * Traits::kWeightPitch);
    }
    static DML_DEVICE int64_t* labels() { return shared_array<int64_t>(Traits::kLabels, kRows); }
    static DML_DEVICE Acc* factors() { return shared_array<Acc>(Traits::kFactors, 2 * kRows); }
    static DML_DEVICE Acc* sums_of_weights() { return shared_array<Acc>(Traits::kWeightSums, kRows); }
    static DML_DEVICE int* list() { return shared_array<int>(Traits::kList, kMostListed + 1); }

    // The factors of the block's rows, where these are rows of the matrix.
    DML_DEVICE void load_rows() const {
        const int r = int(threadIdx.x);
        if (r >= kRows) return;
        const int64_t i = row0 + r;
        const bool own = side.along && i < rows;
        labels()[r] = i < rows ? side.rows.labels[i] : 0;
        factors()[r] = own ? task.upstream.neg(task.row_stats(), i) : Acc(0);
        factors()[kRows + r] = own ? task.upstream.pos(task.row_stats(), i) : Acc(0);
    }

    // Lists the chunks from `first` on, at most kMostListed before `end`, that hold a derivative.
    DML_DEVICE void list_chunks(int64_t first, int64_t end) const {
        uint8_t* present = shared_array<uint8_t>(Traits::kPresent, kMostListed);
        const int count = end - first < kMostListed ? int(end - first) : kMostListed;
#pragma unroll 1
        for (int slot = warp_id(); slot < count; slot += kThreads / kWarpSize) {
            const int64_t chunk = first + slot;
            bool any = false;
            if (side.along) {
                for (int64_t i = row0 + lane_id(); i < row0 + kRows && i < rows; i += kWarpSize)
                    any = any || task.saved.is_occupied(i, chunk);
            }
            if (side.across) {
                for (int64_t j = chunk * kChunk + lane_id(); j < (chunk + 1) * kChunk && j < line;
                     j += kWarpSize)
                    any = any || task.saved.is_occupied(j, row0 / kChunk);
            }
            any = warp_any(any);
            if (lane_id() == 0) present[slot] = any ? 1 : 0;
        }
        block_sync();
        list_slots(list(), count, [&](int slot) { return present[slot] != 0; });
    }

    // A point of the line, as the thread's column of weights needs it.
    struct LinePoint {
        Acc unit, neg, pos;
        int64_t label;
    };
    DML_DEVICE LinePoint load_point(int64_t j) const {
        LinePoint point = {};
        if (j >= line) return point;
        point.unit = unit_factor(side.line.norms[j], task.similarity);
        if (side.across) {
            point.neg = task.upstream.neg(task.row_stats(), j);
            point.pos = task.upstream.pos(task.row_stats(), j);
        }
        if (task.two_parts()) point.label = side.line.labels[j];
        return point;
    }

    // From derivatives to weights of the points as they are. inside: whether the point is in use.
    DML_DEVICE void weigh(int s, const LinePoint& point, bool inside) {
        const int k = int(threadIdx.x) % kDepth;
        const Acc *along = along_of(s), *across = across_of(s);
#pragma unroll
        for (int n = 0; n < kRowsOfThread; ++n) {
            const int r = int(threadIdx.x) / kDepth + n * kRowStep;
            const bool positive = task.two_parts() && labels()[r] == point.label;
            Acc w = 0;
            if (side.along) {
                const Acc u = along[r * Traits::kPitch + k];
                if (u != Acc(0)) w += u * factors()[positive ? kRows + r : r];
            }
            if (side.across) {
                const Acc u = across[k * Traits::kAcrossPitch + r];
                if (u != Acc(0)) w += u * (positive ? point.pos : point.neg);
            }
            const Weight rounded = Weight(inside && row0 + r < rows ? w * point.unit : Acc(0));
            weights()[r * Traits::kWeightPitch + k] = rounded;
            weight_sums[n] += Acc(rounded);
        }
    }

    // Sums over chunks [begin, end) of the line, of dimensions d0 on.
    DML_DEVICE void multiply(Sum& product, int64_t begin, int64_t end, int64_t d0) {
        constexpr int kSlices = kChunk / kDepth;
        const SavedMatrix<Acc>& saved = task.saved;
        const Matrix<Acc> matrix = saved.matrix();
        RowSlices<Acc, kRows, kDepth, Traits::kPitch, kThreads> along(matrix, row0);
        const ColumnBoxes<Acc, kDepth, kRows, Traits::kAcrossPitch, kThreads> across(matrix, 0, row0);
        // Points that are not in use may be anything: their weights of 0 would not hide a NaN.
        const ColumnBoxes<T, kDepth, Traits::kCols, Traits::kPointPitch, kThreads> points(
            {side.line.points.data, side.line.points.stride, line, side.line.points.cols}, 0, d0);
#pragma unroll 1
        for (int64_t first = begin; first < end; first += kMostListed) {
            list_chunks(first, end);
            const int slices = list()[0] * kSlices;
            const auto position = [&](int slice) {
                return (first + list()[1 + slice / kSlices]) * kChunk + slice % kSlices * kDepth;
            };
            int fetched = 0, used = 0;
            const auto next = [&](int s) {
                const int64_t j = position(fetched++);
                if (side.along) along.start_at(along_of(s), matrix, j);
                if (side.across) across.start(across_of(s), int(j));
                points.start(points_of(s), int(j));
            };
            // The next slice's points are loaded while this one is multiplied.
            const auto load_next = [&] {
                return used < slices ? position(used) + int(threadIdx.x) % kDepth : line;
            };
            int64_t j = load_next();
            LinePoint point = load_point(j);
            const auto use = [&](int s, const auto& fetch) {
                weigh(s, point, j < line);
                ++used;
                j = load_next();
                point = load_point(j);
                block_sync();
                product.template add<kDepth>(AlongK<Weight, Traits::kWeightPitch>{weights()},
                                             AcrossK<T, Traits::kPointPitch>{points_of(s)}, fetch);
            };
            pipeline<Traits::kStages>(slices, next, next, use);
        }
        if (!task.sums_weights()) return;
#pragma unroll
        for (int n = 0; n < kRowsOfThread; ++n) {
#pragma unroll
            for (int m = 1; m < kDepth; m *= 2) weight_sums[n] += shfl_xor(weight_sums[n], m);
            if (int(threadIdx.x) % kDepth == 0)
                sums_of_weights()[int(threadIdx.x) / kDepth + n * kRowStep] = weight_sums[n];
        }
        block_sync();
    }

    // All dimensions of the block's rows: projected, a warp a row.
    DML_DEVICE void finish(const Sum& product) const {
        constexpr int kSumPitch = Traits::kSumPitch;
        Acc* sums = reinterpret_cast<Acc*>(stage(0));
        product.for_each([&](int r, int c, Acc x) { sums[r * kSumPitch + c] = x; });
        block_sync();
        const int64_t dim = side.rows.points.cols;
        const Acc all = gradient_factor(task.row_stats(), task.upstream);
        for (int r = warp_id(); r < kRows && row0 + r < side.end; r += kThreads / kWarpSize) {
            const int64_t i = row0 + r;
            const Acc norm = side.rows.norms[i], factor = i < rows ? all : Acc(0);
            project_row(
                side.rows.points, i, task.similarity, norm,
                task.sums_weights() ? sums_of_weights()[r] : Acc(0), factor,
                factor * unit_factor(norm, task.similarity),
                [&](int64_t d) { return sums[r * kSumPitch + d]; }, side.grad + i * dim);
        }
    }

    // A panel of a part, as it is.
    DML_DEVICE void store(const Sum& product, int part, int64_t d0) const {
        const int64_t dim = side.rows.points.cols, left = side.end - row0;
        Acc* sums = side.sums(part, dim) + (row0 - side.begin) * dim + d0;
        product.for_each([&](int r, int c, Acc x) {
            if (r < left && d0 + c < dim) sums[r * dim + c] = x;
        });
        if (!task.sums_weights() || d0 > 0 || int(threadIdx.x) >= kRows || int(threadIdx.x) >= left) return;
        side.weight_sums[part * (side.end - side.begin) + row0 - side.begin + threadIdx.x] =
            sums_of_weights()[threadIdx.x];
    }
};

// Block (x, y, z): rows x of the first side, then of the second; panel y of the dimensions; part z of the line.
template <typename GradMath, bool kWhole, typename T = typename GradMath::Value,
          typename Acc = typename GradMath::Acc>
__global__ void __launch_bounds__(MatrixGradientTraits<GradMath, kWhole>::kThreads,
                                  kWhole ? 1 : kProductBlocks<GradMath>)
    matrix_gradient(const __grid_constant__ MatrixGradientTask<T, Acc> task) {
    using Traits = MatrixGradientTraits<GradMath, kWhole>;
    wait_for_previous_kernel();
    if (!kWhole) let_next_kernel_start();
    const int of = blockIdx.x < task.blocks[0] ? 0 : 1;
    const GradientSide<T, Acc>& side = task.sides[of];
    if (int(blockIdx.z) >= side.parts) return;
    const int64_t row0 = side.begin + int64_t(blockIdx.x - (of == 0 ? 0 : task.blocks[0])) * Traits::kRows;
    const int64_t line = side.line.in_use().points.rows, chunks = (line + kChunk - 1) / kChunk;
    const int64_t d0 = int64_t(blockIdx.y) * Traits::kCols;
    MatrixGradientBlock<GradMath, kWhole> block = {task, side, row0, side.rows.in_use().points.rows, line};
    block.load_rows();
    typename MatrixGradientBlock<GradMath, kWhole>::Sum product;
    block.multiply(product, chunks * blockIdx.z / side.parts, chunks * (blockIdx.z + 1) / side.parts, d0);
    if constexpr (kWhole) {
        block.finish(product);
    } else {
        block.store(product, int(blockIdx.z), d0);
    }
}

// Adds the parts and projects: a warp a row, of both sides.
template <typename T, typename Acc>
__global__ void __launch_bounds__(kFinishThreads)
    finish_matrix_gradient(const __grid_constant__ MatrixGradientTask<T, Acc> task) {
    constexpr int kRows = kFinishThreads / kWarpSize;
    wait_for_previous_kernel();
    const int of = blockIdx.x < task.blocks[0] ? 0 : 1;
    const GradientSide<T, Acc>& side = task.sides[of];
    const int64_t i = side.begin + int64_t(blockIdx.x - (of == 0 ? 0 : task.blocks[0])) * kRows + warp_id();
    if (i >= side.end) return;
    const int64_t dim = side.rows.points.cols, at = i - side.begin, count = side.end - side.begin;
    const RowStats<Acc> stats = task.row_stats();
    const Acc norm = side.rows.norms[i];
    const Acc factor = i < side.rows.in_use().points.rows ? gradient_factor(stats, task.upstream) : Acc(0);
    Acc weight_sum = 0;
    for (int part = 0; task.sums_weights() && part < side.parts; ++part)
        weight_sum += side.weight_sums[part * count + at];
    const auto sum = [&](int64_t d) {
        Acc g = side.first[at * dim + d];
        for (int part = 1; part < side.parts; ++part) g += side.sums(part, dim)[at * dim + d];
        return g;
    };
    project_row(side.rows.points, i, task.similarity, norm, weight_sum, factor,
                factor * unit_factor(norm, task.similarity), sum, side.grad + i * dim);
}

}  // namespace dml::cuda
