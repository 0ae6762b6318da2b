// The host side: lays out the saved tensors, chooses a path and launches it. Instantiated once for each
// kind of arithmetic, in the kernels_*.cu files.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "launch.h"
#include "pair_loss.h"
#include "reduce.cuh"
#include "strip.cuh"
#include "tile_backward.cuh"
#include "tile_forward.cuh"

namespace dml::cuda {

template <typename Math>
struct Engine {
    static SavedSizes saved_sizes(const Problem& problem, bool save_for_backward);
    static int64_t forward_workspace_bytes(const Problem& problem);
    static int64_t backward_workspace_bytes(const Problem& problem);
    static void forward(const Problem& problem, const Mining& mining, const Saved& saved, void* loss,
                        void* workspace, cudaStream_t stream);
    static void backward(const Problem& problem, const Saved& saved, const void* grad_loss,
                         void* grad_queries, void* grad_refs, void* workspace, cudaStream_t stream);
};

// The product of weights and points. A weight has the range of a float, which float16 has not; tf32 holds a
// float16 exactly and does.
template <typename Math>
struct GradMathOf {
    using Type = Math;
};
template <>
struct GradMathOf<HalfMath<__half>> {
    using Type = Tf32Math<__half, false>;
};

// Bytes of the copy that takes the place of points whose rows are not whole 16-byte chunks, or 0.
template <typename T>
int64_t packed_bytes(const Points& p, int64_t dim) {
    const uint64_t stride = static_cast<uint64_t>(p.count > 1 ? p.stride : 0);
    const uint64_t bits =
        reinterpret_cast<uintptr_t>(p.data) | (stride | static_cast<uint64_t>(dim)) * sizeof(T);
    const bool as_they_are = bits % 16 == 0 && stride * sizeof(T) < 1ull << 32;
    return as_they_are || dim == 0 ? 0 : p.count * packed_stride<T>(dim) * int64_t(sizeof(T));
}
template <typename T>
int64_t packed_bytes(const Problem& p) {
    return packed_bytes<T>(p.queries, p.dim) + (p.square ? 0 : packed_bytes<T>(p.refs, p.dim));
}

// The kernels know aligned rows only: packs others at the beginning of the workspace, which moves on.
template <typename T>
Problem with_aligned_rows(Problem p, char*& workspace, cudaStream_t stream) {
    if (p.dim * int64_t(sizeof(T)) >= 1ll << 31) throw std::invalid_argument("dml_cuda: rows of 2 GiB or more");
    const auto align = [&](Points& points) {
        const int64_t bytes = packed_bytes<T>(points, p.dim), pitch = packed_stride<T>(p.dim);
        if (bytes == 0) return;
        T* packed = reinterpret_cast<T*>(workspace);
        constexpr int kRows = kPackThreads / kWarpSize;
        launch(pack_rows<T>, dim3(unsigned((points.count + kRows - 1) / kRows)), dim3(kPackThreads), 0, stream,
               static_cast<const T*>(points.data), points.stride, points.count, p.dim, pitch, packed);
        points.data = packed;
        points.stride = pitch;
        workspace += bytes;
    };
    const auto borrow = [](Points& none, const Points& other) {  // copies may touch memory of a row, if there is none
        if (none.count > 0) return;
        none.data = other.data;
        none.stride = other.stride;
    };
    align(p.queries);
    if (p.square) {
        p.refs = p.queries;
    } else {
        align(p.refs);
        borrow(p.queries, p.refs);
        borrow(p.refs, p.queries);
    }
    return p;
}

// Tiles [begin, end) along one side.
struct TileRange {
    int64_t begin, end;
};

template <typename Math>
struct Call {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;

    const Problem& problem;
    const Saved& saved;
    cudaStream_t stream;

    RowStats<Acc> stats() const { return row_stats<Acc>(saved.stats, saved.plan, problem.queries.count); }

    Acc* query_norms() const { return stats().weight_pos + problem.queries.count; }
    Acc* ref_norms() const { return problem.square ? query_norms() : query_norms() + problem.queries.count; }

    Rows<T, Acc> rows(const Points& p, Acc* norms, const int64_t* used) const {
        return {{static_cast<const T*>(p.data), p.stride, p.count, problem.dim}, p.labels, norms, used};
    }
    Rows<T, Acc> queries() const { return rows(problem.queries, query_norms(), nullptr); }
    Rows<T, Acc> refs() const {
        return problem.square ? queries() : rows(problem.refs, ref_norms(), problem.ref_count);
    }

    StripPairs<T, Acc> strips(bool of_queries) const {
        const Rows<T, Acc> own = of_queries ? queries() : refs(), other = of_queries ? refs() : queries();
        const int pitch = int(StripLayout<T, Acc>::pitch(other.points.rows));
        return {own, other, problem.square, of_queries, problem.self_ref, problem.normalize, pitch};
    }
    static dim3 strip_grid(const StripPairs<T, Acc>& pairs) {
        return dim3(unsigned((pairs.own.points.rows + kStripRows - 1) / kStripRows));
    }
    static size_t strip_bytes(const StripPairs<T, Acc>& pairs) {
        return StripLayout<T, Acc>::bytes(pairs.other.points.rows);
    }

    template <typename Loss>
    void forward_strips(const Mining& mining, Acc* loss) const {
        const auto pairs = strips(true);
        launch(strip_forward<Math, Loss>, strip_grid(pairs), dim3(kStripThreads), strip_bytes(pairs), stream,
               pairs, Loss(problem.params), mining.on, Acc(mining.epsilon), stats());
        reduce<Loss>(loss);
    }

    template <typename Loss>
    void reduce(Acc* result) const {
        const int64_t refs = problem.square ? 0 : problem.refs.count;
        launch(reduce_losses<Loss, Acc>, dim3(1), dim3(kReduceThreads), kReduceSharedBytes, stream,
               Loss(problem.params), stats(), problem.queries.count, query_norms(), ref_norms(), refs,
               problem.ref_count, problem.reduction, result);
    }

    template <typename Loss>
    void backward_strips(bool of_queries, const Acc* grad_loss, T* grad) const {
        const auto pairs = strips(of_queries);
        const Sides sides = {of_queries, problem.square || !of_queries};
        launch(strip_backward<Math, typename GradMathOf<Math>::Type, Loss>, strip_grid(pairs),
               dim3(kStripThreads), strip_bytes(pairs), stream, pairs, Loss(problem.params), stats(), sides,
               grad_loss, problem.reduction == Reduction::kNone, grad);
    }

    // ---- large batches --------------------------------------------------------------------------------

    using GradMath = typename GradMathOf<Math>::Type;
    using Traits = TileTraits<Math>;
    using Weight = typename WeightOf<GradMath>::Type;
    static constexpr int kTile = Traits::kTile;
    static constexpr bool kSumsApart = !std::is_same_v<T, Acc>;  // gradients are narrower than their sums
    static constexpr int64_t kBackwardBudget = 62ll << 20;       // bytes of cache, weights and sums together
    static constexpr int64_t kWeightBudget = 24ll << 20;         // bytes of weights at once
    static constexpr int64_t kExtremesBudget = 16ll << 20;       // bytes of the tiles' extremes
    static constexpr int64_t kKeptBudget = 16ll << 20;           // tiles known to be kept or not

    static int64_t tiles_along(int64_t rows) { return (rows + kTile - 1) / kTile; }
    static int64_t tile_count_of(const Problem& p) {
        return tile_count(tiles_along(p.queries.count), tiles_along(p.refs.count), p.square);
    }
    static int forward_super_tile(const Problem& p) { return std::min(p.tuning.super_tile, kMaxSuperTile); }
    static int backward_super_tile(const Problem& p) {
        constexpr int64_t kTiles = kWeightBudget / (kTile * kTile * int64_t(sizeof(Weight)));
        const int most = std::min(forward_super_tile(p), static_cast<int>(std::sqrt(double(kTiles))));
        // Super-tiles of equal size: the last should not be a sliver.
        const int64_t along = std::max(tiles_along(p.queries.count), tiles_along(p.refs.count));
        const int64_t count = (along + most - 1) / most;
        return static_cast<int>((along + count - 1) / count);
    }
    static int64_t similarity_bytes(const Problem& p) {
        return tile_count_of(p) * kTile * kTile * int64_t(sizeof(Acc));
    }
    static bool caches(const Problem& p) { return similarity_bytes(p) <= p.tuning.cache_bytes; }
    static bool knows_extremes(const Problem& p) {  // their use is to tell which tiles were not kept
        return tile_count_of(p) * 2 * int64_t(sizeof(Acc)) <= kExtremesBudget && knows_kept(p);
    }
    static bool knows_kept(const Problem& p) { return tile_count_of(p) <= kKeptBudget; }

    TileRange all_rows() const { return {0, tiles_along(problem.queries.count)}; }
    TileRange all_cols() const { return {0, tiles_along(problem.refs.count)}; }

    // Calls f(super, rows are first met, columns are first met, rows have met all) in a fixed order. (In a
    // square matrix the rows below the first super-tiles were first met as columns of those.)
    template <typename F>
    void for_super_tiles(int size, TileRange rows, TileRange cols, const F& f) const {
        for (int64_t i = rows.begin; i < rows.end; i += size) {
            for (int64_t j = problem.square ? std::max(i, cols.begin) : cols.begin; j < cols.end; j += size) {
                const SuperTile<T, Acc> super = {queries(),
                                                 refs(),
                                                 problem.square,
                                                 problem.self_ref,
                                                 i,
                                                 j,
                                                 static_cast<int>(std::min<int64_t>(size, rows.end - i)),
                                                 static_cast<int>(std::min<int64_t>(size, cols.end - j)),
                                                 all_rows().end,
                                                 all_cols().end,
                                                 all_cols().end,
                                                 caches(problem) ? static_cast<Acc*>(saved.tiles) : nullptr,
                                                 false};
                f(super, j == cols.begin, i == rows.begin, j + size >= cols.end);
            }
        }
    }

    void prepare(const Rows<T, Acc>& rows, bool start, bool mining) const {
        constexpr int kRows = kNormThreads / kWarpSize;
        launch(prepare_rows<T, Acc>, dim3(unsigned((rows.points.rows + kRows - 1) / kRows)),
               dim3(kNormThreads), 0, stream, rows, problem.normalize, stats(), start, mining);
    }

    template <typename Loss>
    void forward_tiles(const Mining& mining, Acc* loss, void* workspace) const {
        const int size = forward_super_tile(problem);
        const Partials<Acc> partials = {static_cast<Acc*>(workspace), size, size * kTile};
        Acc* extremes =
            mining.on && knows_extremes(problem) ? partials.data + partials_size(size, kTile) : nullptr;
        uint8_t* kept = knows_kept(problem) ? saved.kept : nullptr;
        const auto tiles_of = [](const auto& super) {
            return dim3(unsigned(super.col_tiles), unsigned(super.row_tiles));
        };
        const auto fold_grid = [&](const auto& super) {
            const bool cols_too = problem.square && !super.diagonal();
            const int tiles = cols_too ? std::max(super.row_tiles, super.col_tiles) : super.row_tiles;
            return dim3(unsigned((tiles * kTile + kFoldThreads - 1) / kFoldThreads), cols_too ? 2 : 1);
        };
        prepare(queries(), true, mining.on);
        if (!problem.square) prepare(refs(), false, mining.on);
        if (mining.on) {
            for_super_tiles(size, all_rows(), all_cols(), [&](const auto& super, bool, bool, bool last) {
                launch(find_extremes<Math>, tiles_of(super), dim3(Traits::kThreads), Traits::kSharedBytes,
                       stream, super, partials, extremes);
                launch(fold_extremes<kTile, T, Acc>, fold_grid(super), dim3(kFoldThreads), 0, stream, super,
                       stats(), partials, last, Acc(mining.epsilon));
            });
        }
        for_super_tiles(size, all_rows(), all_cols(), [&](auto super, bool, bool, bool last) {
            super.cache_filled = super.cache && mining.on;
            launch(accumulate<Math, Loss>, tiles_of(super), dim3(Traits::kThreads), Traits::kSharedBytes,
                   stream, super, Loss(problem.params), stats(), partials, extremes, kept);
            launch(fold_sums<Loss, kTile, T, Acc>, fold_grid(super), dim3(kFoldThreads), 0, stream, super,
                   Loss(problem.params), stats(), partials, kept, last, mining.on);
        });
        reduce<Loss>(loss);
    }

    // Where 16-bit gradients are summed in float32, those sums are bounded as well: the rows are cut into
    // groups, and a group's gradient is finished before the next begins. A pair of two groups is then met
    // twice, in the turn of either. Elsewhere there is one group, and its sums are the gradient itself.
    static int64_t sum_bytes(const Problem& p, int64_t tiles) {
        return tiles * kTile * p.dim * int64_t(sizeof(Acc));
    }
    static int64_t most_summed_tiles(const Problem& p) {
        const int64_t taken = weight_bytes(p) + (caches(p) ? similarity_bytes(p) : 0);
        const int64_t room = std::min(p.tuning.sum_bytes, kBackwardBudget - taken);
        return std::max<int64_t>(room / std::max<int64_t>(sum_bytes(p, 1), 1), 1);
    }
    static int64_t group_tiles(const Problem& p, int64_t tiles) {
        if (!kSumsApart) return tiles;
        const int64_t most = most_summed_tiles(p), groups = (tiles + most - 1) / most;
        return (tiles + groups - 1) / groups;  // of equal size
    }
    static bool sums_both_sides(const Problem& p) {
        const int64_t tiles = tiles_along(p.queries.count) + tiles_along(p.refs.count);
        return !p.square && (!kSumsApart || tiles <= most_summed_tiles(p));
    }
    static int64_t sum_bytes(const Problem& p) {
        const int64_t rows = tiles_along(p.queries.count), cols = tiles_along(p.refs.count);
        if (!kSumsApart) return 0;
        if (sums_both_sides(p)) return sum_bytes(p, rows + cols);
        return sum_bytes(p, std::max(group_tiles(p, rows), group_tiles(p, cols)));
    }

    // Some tiles' rows on one side, and the sum of their gradient; null where it is not wanted now.
    struct Group {
        TileRange tiles;
        Acc* sum;
    };

    template <typename Loss>
    struct Backward {
        const Call& call;
        const Acc* grad_loss;
        Weight* weights;
        Acc* sums;

        // The sum of the rows of `tiles`, whose gradient is part of grad.
        Group group(TileRange tiles, T* grad, Acc* apart) const {
            if (!grad) return {tiles, nullptr};
            if constexpr (kSumsApart) {
                return {tiles, apart};
            } else {
                return {tiles, grad + tiles.begin * kTile * call.problem.dim};
            }
        }

        // Adds to both groups what their pairs give. fresh: nothing has been added to either.
        void add_pairs(const Group& rows, const Group& cols, bool fresh) const {
            const Problem& p = call.problem;
            const bool per_row = p.reduction == Reduction::kNone;
            const uint8_t* kept = knows_kept(p) ? call.saved.kept : nullptr;
            const auto add = [&](auto super, bool rows_first, bool cols_first, bool) {
                super.cache_filled = super.cache != nullptr;
                launch(pair_weights<Math, Loss, Weight>,
                       dim3(unsigned(super.col_tiles), unsigned(super.row_tiles)), dim3(Traits::kThreads),
                       Traits::kSharedBytes, call.stream, super, Loss(p.params), call.stats(), grad_loss,
                       per_row, kept, weights);
                const Gradients<Acc> gradients = {
                    {{rows.sum, rows.tiles.begin * kTile, p.queries.count, fresh && rows_first},
                     {cols.sum, cols.tiles.begin * kTile, p.refs.count, fresh && cols_first}}};
                const int owners = super.row_tiles + (super.diagonal() ? 0 : super.col_tiles);
                const auto multiply = [&](auto panel) {
                    using Grad = GradTraits<GradMath, decltype(panel)::value>;
                    launch(add_gradients<GradMath, Grad::kCols>,
                           dim3(unsigned((p.dim + Grad::kCols - 1) / Grad::kCols), unsigned(owners)),
                           dim3(Grad::kThreads), Grad::kSharedBytes, call.stream, super, gradients, kept,
                           weights);
                };
                constexpr int kWide = kWidePanel<GradMath>;
                if (p.dim > kNarrowPanel && (p.dim + kWide - 1) / kWide * owners >= kEnoughBlocks) {
                    multiply(std::integral_constant<int, kWide>());
                } else {
                    multiply(std::integral_constant<int, kNarrowPanel>());
                }
            };
            call.for_super_tiles(backward_super_tile(p), rows.tiles, cols.tiles, add);
        }

        void finish(const Rows<T, Acc>& rows, const Group& group, T* grad) const {
            if (!grad) return;
            constexpr int kRows = kFinishThreads / kWarpSize;
            const int64_t begin = group.tiles.begin * kTile;
            const int64_t end = std::min(group.tiles.end * kTile, rows.points.rows);
            const Acc* upstream = call.problem.reduction == Reduction::kNone ? nullptr : grad_loss;
            launch(finish_gradient<T, Acc>, dim3(unsigned((end - begin + kRows - 1) / kRows)),
                   dim3(kFinishThreads), 0, call.stream, rows, begin, end, call.problem.normalize,
                   call.stats().scale, upstream, group.sum, grad);
        }

        // Calls f(group) for each group of one side's tiles, and finishes its gradient.
        template <typename F>
        void each_group(const Rows<T, Acc>& side, TileRange all, T* grad, const F& f) const {
            if (!grad) return;
            const int64_t size = group_tiles(call.problem, all.end);
            for (int64_t first = 0; first < all.end; first += size) {
                const Group part = group({first, std::min(first + size, all.end)}, grad, sums);
                f(part);
                finish(side, part, grad);
            }
        }

        void run(T* grad_queries, T* grad_refs) const {
            const Problem& p = call.problem;
            const TileRange rows = call.all_rows(), cols = call.all_cols();
            if (p.square) {
                each_group(call.queries(), rows, grad_queries, [&](const Group& own) {
                    add_pairs(own, own, true);
                    add_pairs(own, {{own.tiles.end, cols.end}, nullptr}, false);
                    add_pairs({{0, own.tiles.begin}, nullptr}, own, false);
                });
            } else if (sums_both_sides(p)) {
                const Group of_rows = group(rows, grad_queries, sums);
                const Group of_cols = group(cols, grad_refs, sums + rows.end * kTile * p.dim);
                add_pairs(of_rows, of_cols, true);
                finish(call.queries(), of_rows, grad_queries);
                finish(call.refs(), of_cols, grad_refs);
            } else {
                each_group(call.queries(), rows, grad_queries,
                           [&](const Group& own) { add_pairs(own, {cols, nullptr}, true); });
                each_group(call.refs(), cols, grad_refs,
                           [&](const Group& own) { add_pairs({rows, nullptr}, own, true); });
            }
        }
    };

    template <typename Loss>
    void backward_tiles(const Acc* grad_loss, T* grad_queries, T* grad_refs, void* workspace) const {
        char* bytes = static_cast<char*>(workspace);
        Weight* weights = reinterpret_cast<Weight*>(bytes);
        Acc* sums = reinterpret_cast<Acc*>(bytes + weight_bytes(problem));
        Backward<Loss>{*this, grad_loss, weights, sums}.run(grad_queries, grad_refs);
    }

    static int64_t weight_bytes(const Problem& p) {
        const int64_t size = backward_super_tile(p);
        const int64_t rows = std::min(size, tiles_along(p.queries.count));
        const int64_t cols = std::min(size, tiles_along(p.refs.count));
        return rows * cols * kTile * kTile * int64_t(sizeof(Weight));
    }

    // Without columns or rows there is no tile, but a strip.
    static bool uses_strips(const Problem& p) {
        const int64_t n = p.queries.count, m = p.refs.count;
        return std::max(n, m) <= std::min(p.tuning.strip_limit, kStripMaxCols<Acc>) || std::min(n, m) == 0;
    }
};

template <typename Acc, typename F>
void with_loss(PairLoss loss, const F& f) {
    if (loss == PairLoss::kCircle) {
        f(static_cast<Circle<Acc>*>(nullptr));
    } else {
        f(static_cast<MultiSimilarity<Acc>*>(nullptr));
    }
}

template <typename Math>
SavedSizes Engine<Math>::saved_sizes(const Problem& problem, bool save_for_backward) {
    using C = Call<Math>;
    const int64_t n = problem.queries.count, m = problem.square ? 0 : problem.refs.count;
    SavedSizes sizes = {kStatsHeader + (kStatsPerRow + 1) * n + m, n, 0, 0};
    if (C::uses_strips(problem)) return sizes;
    const int64_t tiles = C::tile_count_of(problem);
    if (save_for_backward && C::caches(problem)) sizes.tiles = tiles * C::kTile * C::kTile;
    if (C::knows_kept(problem)) sizes.kept = tiles;
    return sizes;
}

template <typename Math>
int64_t Engine<Math>::forward_workspace_bytes(const Problem& problem) {
    using C = Call<Math>;
    const int64_t packed = packed_bytes<typename Math::Value>(problem);
    if (C::uses_strips(problem)) return packed;
    int64_t numbers = partials_size(C::forward_super_tile(problem), C::kTile);
    if (C::knows_extremes(problem)) numbers += 2 * C::tile_count_of(problem);
    return packed + numbers * int64_t(sizeof(typename Math::Acc));
}

template <typename Math>
int64_t Engine<Math>::backward_workspace_bytes(const Problem& problem) {
    using C = Call<Math>;
    const int64_t packed = packed_bytes<typename Math::Value>(problem);
    return packed + (C::uses_strips(problem) ? 0 : C::weight_bytes(problem) + C::sum_bytes(problem));
}

template <typename Math>
void Engine<Math>::forward(const Problem& problem, const Mining& mining, const Saved& saved, void* loss,
                           void* workspace, cudaStream_t stream) {
    using Acc = typename Math::Acc;
    char* bytes = static_cast<char*>(workspace);
    const Problem aligned = with_aligned_rows<typename Math::Value>(problem, bytes, stream);
    const Call<Math> call{aligned, saved, stream};
    with_loss<Acc>(problem.loss, [&](auto* tag) {
        using Loss = std::remove_pointer_t<decltype(tag)>;
        if (Call<Math>::uses_strips(problem)) {
            call.template forward_strips<Loss>(mining, static_cast<Acc*>(loss));
        } else {
            call.template forward_tiles<Loss>(mining, static_cast<Acc*>(loss), bytes);
        }
    });
}

template <typename Math>
void Engine<Math>::backward(const Problem& problem, const Saved& saved, const void* grad_loss,
                            void* grad_queries, void* grad_refs, void* workspace, cudaStream_t stream) {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    char* bytes = static_cast<char*>(workspace);
    const Problem aligned = with_aligned_rows<T>(problem, bytes, stream);
    const Call<Math> call{aligned, saved, stream};
    const Acc* upstream = static_cast<const Acc*>(grad_loss);
    T *of_queries = static_cast<T*>(grad_queries), *of_refs = static_cast<T*>(grad_refs);
    with_loss<Acc>(problem.loss, [&](auto* tag) {
        using Loss = std::remove_pointer_t<decltype(tag)>;
        if (Call<Math>::uses_strips(problem)) {
            if (of_queries) call.template backward_strips<Loss>(true, upstream, of_queries);
            if (of_refs) call.template backward_strips<Loss>(false, upstream, of_refs);
        } else if (of_queries || of_refs) {
            call.template backward_tiles<Loss>(upstream, of_queries, of_refs, bytes);
        }
    });
}

}  // namespace dml::cuda
