// The host side: lays out the saved tensors, chooses a path and launches it. Instantiated once for each
// kind of arithmetic, in the kernels_*.cu files.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/common/launch.h"
#include "cuda/pairs/merge.h"
#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/row_block.cuh"
#include "cuda/pairs/tile_backward.cuh"
#include "cuda/pairs/tile_forward.cuh"

namespace dml::cuda {

extern template struct Merge<float>;
extern template struct Merge<double>;

template <typename Math>
struct Engine {
    static int64_t saved_bytes(const Task& task, bool save_for_backward);
    static int64_t forward_workspace_bytes(const Task& task);
    static int64_t backward_workspace_bytes(const Task& task);
    static void forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
                        cudaStream_t stream);
    static void backward(const Task& task, bool saved_for_backward, void* saved, const void* grad_loss,
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
Task with_aligned_rows(Task task, unsigned char*& workspace, cudaStream_t stream) {
    Problem& p = task.problem;
    if (p.dim * int64_t(sizeof(T)) >= 1ll << 31)
        throw std::invalid_argument("dml_cuda: rows of 2 GiB or more");
    const auto align = [&](Points& points) {
        const int64_t bytes = packed_bytes<T>(points, p.dim), pitch = packed_stride<T>(p.dim);
        if (bytes == 0) return;
        T* packed = reinterpret_cast<T*>(workspace);
        constexpr int kRows = kPackThreads / kWarpSize;
        launch(pack_rows<T>, dim3(unsigned((points.count + kRows - 1) / kRows)), dim3(kPackThreads), 0,
               stream, static_cast<const T*>(points.data), points.stride, points.count, p.dim, pitch, packed);
        points.data = packed;
        points.stride = pitch;
        workspace += bytes;
    };
    // Copies may touch memory of a row even where there is none.
    const auto borrow = [](Points& none, const Points& other) {
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
    return task;
}

// Tiles [begin, end) along one side.
struct TileRange {
    int64_t begin, end;
};

// What is known of a formula on the host.
struct FormulaFacts {
    bool context, counts_pairs;
    int parts;
};
inline FormulaFacts formula_facts(FormulaId formula) {
    FormulaFacts facts = {};
    with_formula(formula, [&](auto tag) {
        using Formula = typename decltype(tag)::template Of<float>;
        facts = {Formula::kContext, Formula::kCount == Count::kPairs, Formula::kParts};
    });
    return facts;
}

// Where a caller keeps what is otherwise part of `saved` (blocks.cuh).
template <typename Acc>
struct Places {
    RowStats<Acc> stats;
    Acc *query_norms, *ref_norms;
    uint8_t* kept;  // null: not known
};

template <typename Math>
struct Work {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    using GradMath = typename GradMathOf<Math>::Type;
    using Traits = TileTraits<Math>;
    using Grid = PairGrid<Math>;
    using Weight = typename WeightOf<GradMath>::Type;
    static constexpr int kTile = Traits::kTile;
    static_assert(kTile == Merge<Acc>::kTile, "their merges know the tiles");
    static constexpr bool kSumsApart = !std::is_same_v<T, Acc>;  // gradients are narrower than their sums
    static constexpr int64_t kBackwardBudget = 62ll << 20;       // bytes of cache, weights and sums together
    static constexpr int64_t kWeightBudget = 24ll << 20;         // bytes of weights at once
    static constexpr int64_t kPartBudget = 4ll << 20;            // bytes of gradients of parts of lines

    const Task& task;
    bool saves;
    unsigned char* saved;
    cudaStream_t stream;
    const Problem& p = task.problem;
    const Places<Acc>* apart = nullptr;

    // ---- what is saved: numbers, the tiles' similarities, then bytes ------------------------------------

    static SavedLayout<int64_t> layout(const Task& t, bool saves) {
        const Problem& p = t.problem;
        return {p.queries.count,      p.refs.count,        p.dim, p.square, sizeof(Acc), saves,
                t.tuning.strip_limit, t.tuning.cache_bytes};
    }
    static int64_t saved_bytes(const Task& t, bool saves) { return layout(t, saves).bytes; }

    RowStats<Acc> stats() const {
        if (apart) return apart->stats;
        Acc* header = reinterpret_cast<Acc*>(saved);
        Acc* a = header + kHeader;
        const int64_t n = p.queries.count;
        return {header,    a,         a + n,     a + 2 * n,
                a + 3 * n, a + 4 * n, a + 5 * n, saved + layout(task, saves).flags};
    }
    Acc* query_norms() const { return apart ? apart->query_norms : stats().d_pos + p.queries.count; }
    Acc* ref_norms() const {
        if (apart) return apart->ref_norms;
        return p.square ? query_norms() : query_norms() + p.queries.count;
    }
    Acc* cache() const {
        return saves && caches(task) ? reinterpret_cast<Acc*>(saved + layout(task, saves).similarities)
                                     : nullptr;
    }
    uint8_t* kept() const {
        if (apart) return apart->kept;
        return knows_kept(p) ? saved + layout(task, saves).kept : nullptr;
    }

    // ---- arguments of kernels -----------------------------------------------------------------------------

    Rows<T, Acc> rows(const Points& side, Acc* norms, const int64_t* used) const {
        return {{static_cast<const T*>(side.data), side.stride, side.count, p.dim}, side.labels, norms, used};
    }
    Rows<T, Acc> queries() const { return rows(p.queries, query_norms(), nullptr); }
    Rows<T, Acc> refs() const { return p.square ? queries() : rows(p.refs, ref_norms(), p.num_valid_refs); }

    // Whether a summand of 0 counts.
    bool count_zeros() const {
        return !(formula_facts(p.formula).counts_pairs && p.reduction == Reduction::kMeanNonzero);
    }
    Upstream<Acc> upstream(const Acc* grad_loss) const {
        return {grad_loss, p.reduction, !p.return_sums, formula_facts(p.formula).parts - 1};
    }
    // Results of the rows, before they are reduced. In strips each row has a slot, else each warp of a merge.
    static int64_t result_slots(const Task& t) {
        const int64_t n = t.problem.queries.count;
        return uses_strips(t) ? n : (n + kWarpSize - 1) / kWarpSize;
    }
    static int64_t results_size(const Task& t) { return kResultNumbers * result_slots(t); }
    Results<Acc> results(void* workspace, Acc* loss) const {
        return {static_cast<Acc*>(workspace), result_slots(task),
                p.reduction == Reduction::kNone ? loss : nullptr, p.reduction};
    }

    void reduce(const Results<Acc>& results, Acc* loss) const {
        const int64_t refs = p.square ? 0 : p.refs.count;
        Merge<Acc>::reduce(stats(), p.queries.count, results, ref_norms(), refs, p.num_valid_refs,
                           Division{p.reduction, !p.return_sums, formula_facts(p.formula).parts}, loss,
                           stream);
    }

    // ---- small batches ------------------------------------------------------------------------------------

    StripPairs<T, Acc> strips(bool of_queries) const {
        const Rows<T, Acc> own = of_queries ? queries() : refs(), other = of_queries ? refs() : queries();
        const int pitch = int(StripLayout<T, Acc>::pitch(other.points.rows));
        return {own, other, p.square, of_queries, p.self_index, p.mine_self_pair, p.similarity, pitch};
    }
    static dim3 strip_grid(const StripPairs<T, Acc>& pairs) {
        return dim3(unsigned((pairs.own.points.rows + kStripRows - 1) / kStripRows));
    }
    static size_t strip_bytes(const StripPairs<T, Acc>& pairs) {
        return StripLayout<T, Acc>::bytes(pairs.other.points.rows);
    }

    void forward_strips(Acc* loss, void* workspace) const {
        const auto pairs = strips(true);
        const Results<Acc> to = results(workspace, loss);
        launch(strip_forward<Math>, strip_grid(pairs), dim3(kStripThreads), strip_bytes(pairs), stream, pairs,
               AnyFormula<Acc>(p), p.mining, count_zeros(), stats(), to);
        reduce(to, loss);
    }

    void backward_strips(bool of_queries, const Acc* grad_loss, T* grad) const {
        const auto pairs = strips(of_queries);
        const Sides sides = {of_queries, p.square || !of_queries};
        launch(strip_backward<Math, GradMath>, strip_grid(pairs), dim3(kStripThreads), strip_bytes(pairs),
               stream, pairs, AnyFormula<Acc>(p), stats(), sides, upstream(grad_loss), grad);
    }

    // ---- large batches --------------------------------------------------------------------------------

    static int64_t tiles_along(int64_t rows) { return (rows + kTile - 1) / kTile; }
    static int64_t tile_count_of(const Problem& p) {
        return cuda::tile_count_of(p.queries.count, p.refs.count, p.square, sizeof(Acc));
    }
    static int64_t similarity_bytes(const Problem& p) {
        return tile_count_of(p) * kTile * kTile * int64_t(sizeof(Acc));
    }
    static bool caches(const Task& t) { return layout(t, true).caches != 0; }
    static bool knows_extremes(const Problem& p) {
        return extremes_bytes(tile_count_of(p), sizeof(Acc)) > 0 || tile_count_of(p) == 0;
    }
    static bool knows_kept(const Problem& p) { return cuda::knows_kept(tile_count_of(p)) != 0; }

    // TileGroup-tiles are squares of `size` tiles, or of the same area where one side has fewer tiles.
    struct TileGroupShape {
        int64_t rows, cols;
        int64_t tiles() const { return rows * cols; }
    };
    static TileGroupShape tile_group_shape(const Problem& p, int64_t size) {
        const int64_t rows = tiles_along(p.queries.count), cols = tiles_along(p.refs.count);
        if (p.square) return {std::min(size, rows), std::min(size, rows)};
        const auto longer = [&](int64_t all, int64_t other) {
            const int64_t most = std::min<int64_t>({all, size * size / other, 2 * kMaxTileGroup});
            const int64_t count = (all + most - 1) / most;
            return (all + count - 1) / count;  // of equal size: the last should not be a sliver
        };
        if (rows < cols) {
            const int64_t few = std::min(size, rows);
            return {few, longer(cols, few)};
        }
        const int64_t few = std::min(size, cols);
        return {longer(rows, few), few};
    }
    static TileGroupShape forward_shape(const Task& t) {
        return tile_group_shape(t.problem, std::min(t.tuning.tile_group, kMaxTileGroup));
    }
    static TileGroupShape backward_shape(const Task& t) {
        constexpr int64_t kTiles = kWeightBudget / (kTile * kTile * int64_t(sizeof(Weight)));
        const Problem& p = t.problem;
        const int most = std::min(std::min(t.tuning.tile_group, kMaxTileGroup),
                                  static_cast<int>(std::sqrt(double(kTiles))));
        // TileGroup-tiles of equal size: the last should not be a sliver.
        const int64_t along = std::max(tiles_along(p.queries.count), tiles_along(p.refs.count));
        const int64_t count = (along + most - 1) / most;
        return tile_group_shape(p, p.square ? (along + count - 1) / count : most);
    }

    TileRange all_rows() const { return {0, tiles_along(p.queries.count)}; }
    TileRange all_cols() const { return {0, tiles_along(p.refs.count)}; }

    // Calls f(tile_group, turn) in a fixed order. (In a square matrix the rows below the first
    // tile_group-tiles were first met as columns of those.)
    template <typename F>
    void for_tile_groups(TileGroupShape shape, TileRange rows, TileRange cols, const F& f) const {
        for (int64_t i = rows.begin; i < rows.end; i += shape.rows) {
            const int64_t first = p.square ? std::max(i, cols.begin) : cols.begin;
            for (int64_t j = first; j < cols.end; j += shape.cols) {
                const TileGroup<T, Acc> tile_group = {queries(),
                                                      refs(),
                                                      p.square,
                                                      p.self_index,
                                                      p.mine_self_pair,
                                                      p.similarity,
                                                      i,
                                                      j,
                                                      static_cast<int>(std::min(shape.rows, rows.end - i)),
                                                      static_cast<int>(std::min(shape.cols, cols.end - j)),
                                                      all_rows().end,
                                                      all_cols().end,
                                                      all_cols().end,
                                                      cache(),
                                                      false};
                f(tile_group, Turn{j == cols.begin, i == rows.begin, j + shape.cols >= cols.end});
            }
        }
    }
    static dim3 tiles_of(const TileGroup<T, Acc>& tile_group) {
        return dim3(unsigned(tile_group.col_tiles), unsigned(tile_group.row_tiles));
    }
    void prepare(const Rows<T, Acc>& rows, bool open) const {
        constexpr int kRows = kNormThreads / kWarpSize;
        launch(prepare_rows<T, Acc>, dim3(unsigned((rows.points.rows + kRows - 1) / kRows)),
               dim3(kNormThreads), 0, stream, rows, p.similarity, stats(), open);
    }

    // Workspace: the rows' results, partial results of a tile_group-tile, the tiles' extremes.
    static int64_t forward_workspace(const Task& t) {
        int64_t numbers = results_size(t);
        if (!uses_strips(t)) {
            numbers += partials_size(forward_shape(t).tiles(), kTile, t.problem.square);
            if (t.problem.mining.on && knows_extremes(t.problem)) numbers += 2 * tile_count_of(t.problem);
        }
        return numbers * int64_t(sizeof(Acc));
    }

    void forward_tiles(Acc* loss, void* workspace) const {
        const TileGroupShape shape = forward_shape(task);
        const Results<Acc> to = results(workspace, loss);
        const Partials<Acc> partials = {to.data + results_size(task)};
        const bool mining = p.mining.on;
        Acc* extremes = mining && knows_extremes(p)
                            ? partials.data + partials_size(shape.tiles(), kTile, p.square)
                            : nullptr;
        prepare(queries(), !mining);
        if (!p.square) prepare(refs(), false);
        if (mining) {
            for_tile_groups(shape, all_rows(), all_cols(), [&](const auto& tile_group, Turn turn) {
                launch(find_extremes<Math>, tiles_of(tile_group), dim3(Traits::kThreads),
                       Grid::shared_bytes(2), stream, tile_group, partials, extremes);
                Merge<Acc>::extremes(Merge<Acc>::without_points(tile_group), p.square, stats(), partials,
                                     turn, Acc(p.mining.epsilon), stream);
            });
        }
        const AnyFormula<Acc> formula(p);
        const size_t shared_bytes = Grid::shared_bytes(most_summed(p.formula));
        for (int stage = 0; stage < (formula_facts(p.formula).context ? 2 : 1); ++stage) {
            const bool second = stage == 1;
            for_tile_groups(shape, all_rows(), all_cols(), [&](auto tile_group, Turn turn) {
                tile_group.cache_filled = tile_group.cache && (mining || second);
                launch(accumulate<Math>, tiles_of(tile_group), dim3(Traits::kThreads), shared_bytes, stream,
                       tile_group, formula, second, stats(), partials, extremes, kept(), count_zeros());
                Merge<Acc>::sums(Merge<Acc>::without_points(tile_group), p.square, formula, second, stats(),
                                 partials, kept(), turn, mining, to, stream);
            });
        }
        reduce(to, loss);
    }

    // Where 16-bit gradients are summed in float32, those sums are bounded as well: the rows are cut into
    // groups, and a group's gradient is finished before the next begins. A pair of two groups is then met
    // twice, in the turn of either. Elsewhere there is one group, and its sums are the gradient itself.
    static int64_t sum_bytes(const Problem& p, int64_t tiles) {
        return tiles * kTile * p.dim * int64_t(sizeof(Acc));
    }
    static int64_t most_summed_tiles(const Task& t) {
        const Problem& p = t.problem;
        const int64_t room = std::min(t.tuning.sum_bytes, backward_room(t) - part_bytes(t));
        return std::max<int64_t>(room / std::max<int64_t>(sum_bytes(p, 1), 1), 1);
    }
    static int64_t group_tiles(const Task& t, int64_t tiles) {
        if (!kSumsApart) return tiles;
        const int64_t most = most_summed_tiles(t), groups = (tiles + most - 1) / most;
        return (tiles + groups - 1) / groups;  // of equal size
    }
    static bool sums_both_sides(const Task& t) {
        const Problem& p = t.problem;
        const int64_t tiles = tiles_along(p.queries.count) + tiles_along(p.refs.count);
        return !p.square && (!kSumsApart || tiles <= most_summed_tiles(t));
    }
    static int64_t sum_bytes(const Task& t) {
        const Problem& p = t.problem;
        const int64_t rows = tiles_along(p.queries.count), cols = tiles_along(p.refs.count);
        if (!kSumsApart) return 0;
        if (sums_both_sides(t)) return sum_bytes(p, rows + cols);
        return sum_bytes(p, std::max(group_tiles(t, rows), group_tiles(t, cols)));
    }
    static int64_t backward_room(const Task& t) {
        return kBackwardBudget - weight_bytes(t) - (caches(t) ? similarity_bytes(t.problem) : 0);
    }

    // Where a tile_group-tile has few lines for so many multiprocessors, several blocks of the gradient share
    // a line: as many as give each block what it would have if `wide_blocks` had equal work, but split_slots
    // tiles at least. Their sums are folded in order. Where the lines of one side are longer than the others,
    // as where a few rows meet many references, it is they that are shared, and among more blocks.
    static int64_t parts_of_a_line(const Task& t, TileGroupShape shape, bool diagonal) {
        const int64_t line = std::max(shape.rows, shape.cols);
        const int64_t panels = (t.problem.dim + kNarrowPanel - 1) / kNarrowPanel;
        const int64_t slots = shape.tiles() * (diagonal ? 1 : 2) * panels;  // of all lines
        const int64_t at_once = kNeedsManyRegisters<GradMath> ? 1 : 2;      // blocks of a multiprocessor
        const int64_t wanted = t.problem.square ? t.tuning.wide_blocks : t.tuning.line_blocks * at_once / 2;
        const int64_t blocks = std::max<int64_t>(wanted, 1), each = (slots + blocks - 1) / blocks;
        return std::max<int64_t>(line / std::max(t.tuning.split_slots, each), 1);
    }
    static int64_t part_bytes(const Problem& p, TileGroupShape shape, bool diagonal) {  // of one part's sums
        const bool both = shape.rows == shape.cols && !diagonal;
        return (both ? 2 : 1) * std::min(shape.rows, shape.cols) * kTile * p.dim * int64_t(sizeof(Acc));
    }
    static int64_t part_bytes(const Task& t) {
        const Problem& p = t.problem;
        const TileGroupShape shape = backward_shape(t);
        int64_t bytes = 0;
        for (const bool diagonal : {false, true}) {
            const bool there = diagonal ? p.square : !p.square || shape.rows < tiles_along(p.queries.count);
            const int64_t parts = parts_of_a_line(t, shape, diagonal);
            if (there) bytes = std::max(bytes, (parts - 1) * part_bytes(p, shape, diagonal));
        }
        return std::min({bytes, kPartBudget, backward_room(t) / 4}) / 16 * 16;
    }
    static int64_t weight_bytes(const Task& t) {
        return backward_shape(t).tiles() * kTile * kTile * int64_t(sizeof(Weight));
    }
    // Distances of rows as they come need the sum of each line's weights, too.
    static bool sums_weights(const Problem& p) { return p.similarity.euclidean && !p.similarity.normalize; }

    // Workspace: weights of a tile_group-tile, gradients of parts of its lines, sums of 16-bit gradients,
    // sums of weights of a tile_group-tile's lines and of all rows and columns.
    static int64_t backward_workspace(const Task& t) {
        if (uses_strips(t)) return 0;
        const Problem& p = t.problem;
        int64_t numbers = 0;
        if (sums_weights(p)) {
            numbers = partials_size(backward_shape(t).tiles(), kTile, true) + p.queries.count +
                      (p.square ? 0 : p.refs.count);
        }
        return weight_bytes(t) + part_bytes(t) + sum_bytes(t) + numbers * int64_t(sizeof(Acc));
    }

    // Some tiles' rows on one side, and the sum of their gradient; null where it is not wanted now.
    struct Group {
        TileRange tiles;
        Acc* sum;
    };

    struct Backward {
        const Work& work;
        const Acc* grad_loss;
        Weight* weights;
        Acc *parts, *sums;
        Partials<Acc> weight_partials;
        Acc *row_weights, *col_weights;  // sums of weights of all rows, of all columns

        // The sum of the rows of `tiles`, whose gradient is part of grad.
        Group group(TileRange tiles, T* grad, Acc* apart) const {
            if (!grad) return {tiles, nullptr};
            if constexpr (kSumsApart) {
                return {tiles, apart};
            } else {
                return {tiles, grad + tiles.begin * kTile * work.p.dim};
            }
        }

        template <typename TileGroup>
        int64_t blocks_of_a_line(const TileGroup& tile_group) const {
            const TileGroupShape shape = {tile_group.row_tiles, tile_group.col_tiles};
            const int64_t one = std::max<int64_t>(part_bytes(work.p, shape, tile_group.diagonal()), 1);
            const int64_t room = 1 + part_bytes(work.task) / one;
            return std::min(parts_of_a_line(work.task, shape, tile_group.diagonal()), room);
        }

        template <typename TileGroup>
        void merge_parts(const TileGroup& tile_group, const Gradients<Acc>& gradients, int count) const {
            const int64_t dim = work.p.dim;
            const int64_t pitch = gradients.tiles(tile_group.row_tiles, tile_group.col_tiles) * kTile * dim;
            const Acc* parts = gradients.parts;
            for (const int side : {0, 1}) {
                const Gradient<Acc>& to = gradients.side[side];
                const int64_t rows =
                    gradients.tiles(side, tile_group.row_tiles, tile_group.col_tiles) * kTile;
                const int64_t first = (side == 0 ? tile_group.row_tile : tile_group.col_tile) * kTile;
                if (to.sum && rows > 0 && count > 0) {
                    Merge<Acc>::gradient(parts, count, pitch, std::min(rows, to.count - first) * dim,
                                         to.sum + (first - to.row0) * dim, work.stream);
                }
                parts += rows * dim;
            }
        }

        // Adds to both groups what their pairs give. fresh: nothing has been added to either.
        void add_pairs(const Group& rows, const Group& cols, bool fresh) const {
            const Problem& p = work.p;
            const auto add = [&](auto tile_group, Turn turn) {
                tile_group.cache_filled = tile_group.cache != nullptr;
                launch(pair_weights<Math, Weight>, tiles_of(tile_group), dim3(Traits::kThreads),
                       Grid::shared_bytes(1), work.stream, tile_group, AnyFormula<Acc>(p), work.stats(),
                       work.upstream(grad_loss), work.kept(), weights, weight_partials);
                turn.rows_first = turn.rows_first && fresh;
                turn.cols_first = turn.cols_first && fresh;
                if (sums_weights(p)) {
                    Merge<Acc>::weights(Merge<Acc>::without_points(tile_group), weight_partials, work.kept(),
                                        turn, rows.sum ? row_weights : nullptr,
                                        cols.sum ? col_weights : nullptr, work.stream);
                }
                const Gradients<Acc> gradients = {
                    {{rows.sum, rows.tiles.begin * kTile, p.queries.count, turn.rows_first},
                     {cols.sum, cols.tiles.begin * kTile, p.refs.count, turn.cols_first}},
                    // The fewer lines are the longer ones.
                    {tile_group.row_tiles <= tile_group.col_tiles,
                     tile_group.col_tiles <= tile_group.row_tiles && !tile_group.diagonal()},
                    parts};
                const int owners = tile_group.row_tiles + (tile_group.diagonal() ? 0 : tile_group.col_tiles);
                const int wanted = (rows.sum ? tile_group.row_tiles : 0) +
                                   (cols.sum && !tile_group.diagonal() ? tile_group.col_tiles : 0);
                const auto multiply = [&](auto panel) {
                    using Grad = GradTraits<GradMath, decltype(panel)::value>;
                    const int64_t panels = (p.dim + Grad::kCols - 1) / Grad::kCols;
                    const int64_t count = blocks_of_a_line(tile_group);
                    launch(add_gradients<GradMath, Grad::kCols>,
                           dim3(unsigned(panels), unsigned(owners), unsigned(count)), dim3(Grad::kThreads),
                           Grad::kSharedBytes, work.stream, tile_group, gradients, work.kept(), weights);
                    merge_parts(tile_group, gradients, int(count) - 1);
                };
                constexpr int kWide = kWidePanel<GradMath>;
                if (p.dim > kNarrowPanel &&
                    (p.dim + kWide - 1) / kWide * wanted >= work.task.tuning.wide_blocks) {
                    multiply(std::integral_constant<int, kWide>());
                } else {
                    multiply(std::integral_constant<int, kNarrowPanel>());
                }
            };
            work.for_tile_groups(backward_shape(work.task), rows.tiles, cols.tiles, add);
        }

        void finish(const Rows<T, Acc>& rows, const Group& group, const Acc* weight_sums, T* grad) const {
            if (!grad) return;
            constexpr int kRows = kFinishThreads / kWarpSize;
            const int64_t begin = group.tiles.begin * kTile;
            const int64_t end = std::min(group.tiles.end * kTile, rows.points.rows);
            launch(finish_gradient<T, Acc>, dim3(unsigned((end - begin + kRows - 1) / kRows)),
                   dim3(kFinishThreads), 0, work.stream, rows, begin, end, work.p.similarity, work.stats(),
                   work.upstream(grad_loss), weight_sums, group.sum, grad);
        }

        // Calls f(group) for each group of one side's tiles, and finishes its gradient.
        template <typename F>
        void each_group(const Rows<T, Acc>& side, TileRange all, const Acc* weight_sums, T* grad,
                        const F& f) const {
            if (!grad) return;
            const int64_t size = group_tiles(work.task, all.end);
            for (int64_t first = 0; first < all.end; first += size) {
                const Group part = group({first, std::min(first + size, all.end)}, grad, sums);
                f(part);
                finish(side, part, weight_sums, grad);
            }
        }

        void run(T* grad_queries, T* grad_refs) const {
            const Problem& p = work.p;
            const TileRange rows = work.all_rows(), cols = work.all_cols();
            if (p.square) {
                each_group(work.queries(), rows, row_weights, grad_queries, [&](const Group& own) {
                    add_pairs(own, own, true);
                    add_pairs(own, {{own.tiles.end, cols.end}, nullptr}, false);
                    add_pairs({{0, own.tiles.begin}, nullptr}, own, false);
                });
            } else if (sums_both_sides(work.task)) {
                const Group of_rows = group(rows, grad_queries, sums);
                const Group of_cols = group(cols, grad_refs, sums + rows.end * kTile * p.dim);
                add_pairs(of_rows, of_cols, true);
                finish(work.queries(), of_rows, row_weights, grad_queries);
                finish(work.refs(), of_cols, col_weights, grad_refs);
            } else {
                each_group(work.queries(), rows, row_weights, grad_queries,
                           [&](const Group& own) { add_pairs(own, {cols, nullptr}, true); });
                each_group(work.refs(), cols, col_weights, grad_refs,
                           [&](const Group& own) { add_pairs({rows, nullptr}, own, true); });
            }
        }
    };

    void backward_tiles(const Acc* grad_loss, T* grad_queries, T* grad_refs, void* workspace) const {
        unsigned char* bytes = static_cast<unsigned char*>(workspace);
        Weight* weights = reinterpret_cast<Weight*>(bytes);
        bytes += weight_bytes(task);
        Acc* parts = reinterpret_cast<Acc*>(bytes);
        bytes += part_bytes(task);
        Acc* sums = reinterpret_cast<Acc*>(bytes);
        bytes += sum_bytes(task);
        const Partials<Acc> partials = {reinterpret_cast<Acc*>(bytes)};
        Acc* row_weights = nullptr;
        if (sums_weights(p))
            row_weights = partials.data + partials_size(backward_shape(task).tiles(), kTile, true);
        Acc* col_weights = row_weights && !p.square ? row_weights + p.queries.count : row_weights;
        Backward{*this, grad_loss, weights, parts, sums, partials, row_weights, col_weights}.run(grad_queries,
                                                                                                 grad_refs);
    }

    // Without columns or rows there is no tile, but a strip.
    static bool uses_strips(const Task& t) {
        const Problem& p = t.problem;
        return uses_tiles(p.queries.count, p.refs.count, p.dim, t.tuning.strip_limit) == 0;
    }
};

template <typename Math>
int64_t Engine<Math>::saved_bytes(const Task& task, bool save_for_backward) {
    return Work<Math>::saved_bytes(task, save_for_backward);
}

template <typename Math>
int64_t Engine<Math>::forward_workspace_bytes(const Task& task) {
    return packed_bytes<typename Math::Value>(task.problem) + Work<Math>::forward_workspace(task);
}

template <typename Math>
int64_t Engine<Math>::backward_workspace_bytes(const Task& task) {
    return packed_bytes<typename Math::Value>(task.problem) + Work<Math>::backward_workspace(task);
}

template <typename Math>
void Engine<Math>::forward(const Task& task, bool save_for_backward, void* saved, void* loss, void* workspace,
                           cudaStream_t stream) {
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task aligned = with_aligned_rows<typename Math::Value>(task, bytes, stream);
    const Work<Math> work{aligned, save_for_backward, static_cast<unsigned char*>(saved), stream};
    auto* result = static_cast<typename Math::Acc*>(loss);
    if (Work<Math>::uses_strips(task)) {
        work.forward_strips(result, bytes);
    } else {
        work.forward_tiles(result, bytes);
    }
}

template <typename Math>
void Engine<Math>::backward(const Task& task, bool saved_for_backward, void* saved, const void* grad_loss,
                            void* grad_queries, void* grad_refs, void* workspace, cudaStream_t stream) {
    using T = typename Math::Value;
    auto* bytes = static_cast<unsigned char*>(workspace);
    const Task aligned = with_aligned_rows<T>(task, bytes, stream);
    const Work<Math> work{aligned, saved_for_backward, static_cast<unsigned char*>(saved), stream};
    const auto* upstream = static_cast<const typename Math::Acc*>(grad_loss);
    T *of_queries = static_cast<T*>(grad_queries), *of_refs = static_cast<T*>(grad_refs);
    if (Work<Math>::uses_strips(task)) {
        if (of_queries) work.backward_strips(true, upstream, of_queries);
        if (of_refs) work.backward_strips(false, upstream, of_refs);
    } else if (of_queries || of_refs) {
        work.backward_tiles(upstream, of_queries, of_refs, bytes);
    }
}

}  // namespace dml::cuda
