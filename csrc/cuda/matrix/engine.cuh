// The launches of the matrix path, and its workspaces: two kernels forward; one backward up to 128 dimensions,
// two beyond; two for each block of rows whose mined pairs are counted.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/matrix/gradient.cuh"
#include "cuda/matrix/rows.h"
#include "cuda/matrix/similarities.cuh"
#include "cuda/pairs/task_arguments.cuh"

namespace dml::cuda {

// The arithmetic of derivatives times points. A derivative has the range of a float, which float16 lacks; tf32 holds a
// float16 exactly and has it.
template <typename Math>
struct DerivativeMathOf {
    using Type = Math;
};
template <>
struct DerivativeMathOf<HalfMath<__half>> {
    using Type = Tf32Math<__half, false>;
};

template <typename Math>
struct MatrixEngine {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    using GradMath = typename DerivativeMathOf<Math>::Type;
    // Gradients of the accumulating type are summed in place.
    static constexpr bool kInPlace = std::is_same_v<T, Acc>;
    static constexpr int64_t kSumBudget = 28ll << 20;  // bytes of gradients of parts, of all sides
    const Task& task;                                  // with aligned rows
    const Problem& p = task.problem;

    Rows<T, Acc> rows(const Points& side, Acc* norms, const int64_t* used) const {
        return {{static_cast<const T*>(side.data), side.stride, side.count, p.dim}, side.labels, norms, used};
    }
    Rows<T, Acc> queries(const SavedMatrix<Acc>& saved) const {
        return rows(p.queries, saved.query_norms, nullptr);
    }
    Rows<T, Acc> refs(const SavedMatrix<Acc>& saved) const {
        return p.square ? queries(saved) : rows(p.refs, saved.ref_norms, p.num_valid_refs);
    }

    // ---- forward ------------------------------------------------------------------------------------------

    int64_t forward_workspace_bytes() const { return RowsWorkspace<Acc>(p).bytes(); }

    void forward(bool has_backward, void* saved_bytes, Acc* loss, void* workspace, Launches& launches) const {
        const SavedMatrix<Acc> saved(p, saved_bytes);
        const RowsWorkspace<Acc> space(p, workspace);
        multiply(saved, space.ticket, launches);
        launch_rows(task, saved, has_backward, space, loss, launches);
    }
    void multiply(const SavedMatrix<Acc>& saved, unsigned* ticket, Launches& launches) const {
        if (p.queries.count * p.refs.count > task.tuning.small_tile_pairs) {
            multiply_tiles<true>(saved, ticket, launches);
        } else {
            multiply_tiles<false>(saved, ticket, launches);
        }
    }
    template <bool kLarge>
    void multiply_tiles(const SavedMatrix<Acc>& saved, unsigned* ticket, Launches& launches) const {
        using Traits = SimilarityTraits<Math, kLarge>;
        const auto tiles = [](int64_t count, int size) {
            return std::max<int64_t>((count + size - 1) / size, 1);
        };
        const SimilarityTask<T, Acc> of = {queries(saved), refs(saved), p.square,
                                           p.similarity,   saved,       ticket};
        launches(similarities<Math, kLarge>,
                 dim3(unsigned(tiles(p.queries.count, Traits::kRows) * tiles(p.refs.count, Traits::kCols))),
                 dim3(Traits::kThreads), Traits::kSharedBytes, of);
    }

    // ---- counting -----------------------------------------------------------------------------------------

    // How many rows' similarities are in memory at once.
    int64_t rows_at_once() const {
        const int64_t row_bytes =
            std::max<int64_t>(matrix_pitch(p.refs.count, sizeof(Acc)) * int64_t(sizeof(Acc)), 1);
        return std::clamp<int64_t>(task.tuning.matrix_bytes / row_bytes, 1,
                                   std::max<int64_t>(p.queries.count, 1));
    }
    // The task of rows from `first` on.
    Task rows_from(int64_t first) const {
        Task part = task;
        Points& side = part.problem.queries;
        side.count = std::min(rows_at_once(), side.count - first);
        part.problem.square = p.square && side.count == p.queries.count;
        side.data = static_cast<const T*>(side.data) + first * side.stride;
        side.labels += first;
        return part;
    }
    int64_t count_workspace_bytes() const {
        return kTicketBytes + MatrixSizes<int64_t>(rows_at_once(), p.refs.count, false, sizeof(Acc)).bytes;
    }
    // counts: [2, rows] how many positives and negatives mining keeps of each row.
    void count(int64_t* counts, void* workspace, Launches& launches) const {
        auto* const ticket = static_cast<unsigned*>(workspace);  // nobody draws one
        for (int64_t first = 0; first < p.queries.count; first += rows_at_once()) {
            const Task part = rows_from(first);
            const SavedMatrix<Acc> saved(part.problem, static_cast<unsigned char*>(workspace) + kTicketBytes);
            MatrixEngine{part}.multiply(saved, ticket, launches);
            launch_counts(task, saved, first, counts, launches);
        }
    }

    // ---- backward -----------------------------------------------------------------------------------------

    // How a side's gradient is cut: so many rows in a launch, and so many parts of the line they sum over.
    struct Cut {
        int64_t rows;
        int parts;

        int64_t sums() const { return rows * (parts - (kInPlace ? 1 : 0)); }  // rows of sums in the workspace
    };
    // Whether one launch does all.
    bool is_whole() const {
        return p.dim <= kGradientCols && std::max(p.queries.count, p.refs.count) <= task.tuning.whole_line;
    }
    // As many parts as give each multiprocessor a block, if so many sums fit.
    Cut cut(bool of_queries) const {
        const int64_t rows = (of_queries ? p.queries : p.refs).count,
                      line = (of_queries ? p.refs : p.queries).count;
        constexpr int64_t kRows = MatrixGradientTraits<GradMath, false>::kRows;
        const int64_t panels = (p.dim + kGradientCols - 1) / kGradientCols;
        const int64_t blocks = std::max<int64_t>((rows + kRows - 1) / kRows * panels, 1);
        const int64_t most = std::max<int64_t>((line + kChunk - 1) / kChunk / 2, 1);
        const int64_t fit =
            kSumBudget / (p.square ? 1 : 2) / std::max<int64_t>(p.dim * int64_t(sizeof(Acc)), 1);
        const int64_t room = fit / std::max<int64_t>(rows, 1) + (kInPlace ? 1 : 0);
        const int64_t parts = std::min({(task.tuning.gradient_blocks + blocks - 1) / blocks, most, room});
        if (parts >= 1) return {rows, int(parts)};
        return {std::min(rows, std::max(fit / kRows, int64_t(1)) * kRows), 1};
    }
    bool sums_weights() const { return p.similarity.euclidean && !p.similarity.normalize; }
    int64_t numbers(const Cut& of) const {
        return of.sums() * p.dim + (sums_weights() ? of.rows * of.parts : 0);
    }
    int64_t backward_workspace_bytes() const {
        if (is_whole()) return 0;
        return (numbers(cut(true)) + (p.square ? 0 : numbers(cut(false)))) * int64_t(sizeof(Acc));
    }

    void backward(void* saved_bytes, const Acc* grad_loss, T* grad_queries, T* grad_refs, void* workspace,
                  Launches& launches) const {
        const SavedMatrix<Acc> saved(p, saved_bytes);
        MatrixGradientTask<T, Acc> both = {{}, {}, saved, p.similarity, upstream_of(task, grad_loss)};
        both.sides[0] = {queries(saved), refs(saved), true,    p.square,    0, p.queries.count, 1,
                         nullptr,        nullptr,     nullptr, grad_queries};
        both.sides[1] = {refs(saved), queries(saved), false,   true,    0,        p.refs.count,
                         1,           nullptr,        nullptr, nullptr, grad_refs};
        const bool wanted[2] = {grad_queries != nullptr, grad_refs != nullptr};
        if (is_whole()) {
            add<true>(both, wanted, launches);
            return;
        }
        Acc* numbers_of[2] = {static_cast<Acc*>(workspace),
                              static_cast<Acc*>(workspace) + numbers(cut(true))};
        const bool fit = cut(true).rows == p.queries.count && (p.square || cut(false).rows == p.refs.count);
        for (int group = 0; group < (fit ? 1 : 2); ++group) {
            const bool now[2] = {wanted[0] && (fit || group == 0), wanted[1] && (fit || group == 1)};
            int64_t rest = 1;
            for (int64_t begin = 0; rest > 0;) {
                rest = 0;
                MatrixGradientTask<T, Acc> of = both;
                for (int k = 0; k < 2; ++k) {
                    if (!now[k]) continue;
                    const Cut here = cut(k == 0);
                    GradientSide<T, Acc>& side = of.sides[k];
                    side.begin = begin;
                    side.end = std::min(begin + here.rows, both.sides[k].end);
                    side.parts = here.parts;
                    side.others = numbers_of[k];
                    side.weight_sums = numbers_of[k] + here.sums() * p.dim;
                    if constexpr (kInPlace) {
                        side.first = side.grad + begin * p.dim;
                    } else {
                        side.first = side.others;
                        side.others += (side.end - begin) * p.dim;
                    }
                    rest = both.sides[k].end - side.end;
                    begin = rest > 0 ? side.end : begin;
                }
                add<false>(of, now, launches);
            }
        }
    }

    // One group of rows of each side that is wanted.
    template <bool kWhole>
    void add(MatrixGradientTask<T, Acc>& of, const bool (&wanted)[2], Launches& launches) const {
        using Traits = MatrixGradientTraits<GradMath, kWhole>;
        int parts = 1;
        const auto divide = [&](int64_t rows_of_block) {
            for (int k = 0; k < 2; ++k) {
                const GradientSide<T, Acc>& side = of.sides[k];
                const int64_t blocks = (side.end - side.begin + rows_of_block - 1) / rows_of_block;
                of.blocks[k] = wanted[k] ? unsigned(blocks) : 0;
                if (wanted[k]) parts = std::max(parts, side.parts);
            }
            return of.blocks[0] + of.blocks[1];
        };
        const unsigned blocks = divide(Traits::kRows);
        const unsigned panels = unsigned((p.dim + Traits::kCols - 1) / Traits::kCols);
        launches(matrix_gradient<GradMath, kWhole>, dim3(blocks, panels, unsigned(parts)),
                 dim3(Traits::kThreads), Traits::kSharedBytes, of);
        if (kWhole) return;
        launches(finish_matrix_gradient<T, Acc>, dim3(divide(kFinishThreads / kWarpSize)),
                 dim3(kFinishThreads), 0, of);
    }
};

}  // namespace dml::cuda
