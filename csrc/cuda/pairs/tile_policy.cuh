// How tiles form groups, and what is cached. From sizes and the type alone, as
// shapes must be under torch.compile.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/pairs/partials.cuh"
#include "cuda/pairs/row_stats.cuh"
#include "cuda/pairs/write_image.cuh"

namespace dml::cuda {

// Tiles [begin, end) along one side.
struct TileRange {
    int64_t begin, end;
};

// Tiles of a group along rows and columns.
struct TileGroupShape {
    int64_t rows, cols;
    int64_t tiles() const { return rows * cols; }
};

// Static facts of a formula, on the host.
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

template <typename Math>
struct TilePolicy {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    static constexpr int kTile = kTileSide<Acc>;
    static constexpr int64_t kPlaceBytes = kTile * kTile * int64_t(sizeof(Acc));  // of a tile's similarities

    static int64_t tiles_along(int64_t rows) { return (rows + kTile - 1) / kTile; }
    static int64_t count_tiles(const Problem& p) {
        return tile_count_of(p.queries.count, p.refs.count, p.square, sizeof(Acc));
    }
    static int64_t similarity_bytes(const Problem& p) { return count_tiles(p) * kPlaceBytes; }
    // Whether all similarities are kept from forward for backward; else there are those of a tile group.
    static bool caches(const Task& task) { return similarity_bytes(task.problem) <= task.tuning.cache_bytes; }
    // Whether each tile has a kept flag.
    static bool has_kept(const Problem& p) { return knows_kept(count_tiles(p)) != 0; }
    // Whether each tile's extremes are stored: they tell which tiles mining emptied.
    static bool has_extremes(const Problem& p) { return extremes_bytes(count_tiles(p), sizeof(Acc)) > 0; }

    // ---- images: of all points where they are small, else of a tile group's rows and columns --------------

    static constexpr int64_t kImageBudget = 24ll << 20;       // bytes of the images of a tile group
    static constexpr int64_t kWholeImageBudget = 10ll << 20;  // bytes up to which all points have their image

    // Of the points of one tile.
    static int64_t image_bytes_of_tile(const Problem& p) {
        return PointsLayout<Math>::tile_bytes(p.dim) +
               (PartsOf<Math>::kScaled ? kTile * int64_t(sizeof(float)) : 0);
    }
    static int64_t image_bytes_of_all(const Problem& p) {
        return (tiles_along(p.queries.count) + (p.square ? 0 : tiles_along(p.refs.count))) *
               image_bytes_of_tile(p);
    }
    static bool has_whole_images(const Problem& p) { return image_bytes_of_all(p) <= kWholeImageBudget; }
    // Tiles of rows and of columns whose points have images at a time.
    static TileGroupShape imaged_tiles(const Problem& p, TileGroupShape shape) {
        if (!has_whole_images(p)) return shape;
        return {tiles_along(p.queries.count), p.square ? 0 : tiles_along(p.refs.count)};
    }
    static int64_t image_bytes(const Problem& p, TileGroupShape shape) {
        const TileGroupShape tiles = imaged_tiles(p, shape);
        return (tiles.rows + tiles.cols) * image_bytes_of_tile(p);
    }

    // Squares of `size` tiles, or the same area where one side has fewer tiles; less where their images would not
    // fit.
    static TileGroupShape group_shape(const Problem& p, int64_t size, int64_t image_budget) {
        const int64_t rows = tiles_along(p.queries.count), cols = tiles_along(p.refs.count);
        const int64_t imaged =
            has_whole_images(p) ? rows + cols : std::max<int64_t>(image_budget / image_bytes_of_tile(p), 2);
        size = std::min(size, p.square && has_whole_images(p) ? size : imaged / 2);
        if (p.square) return {std::min(size, rows), std::min(size, rows)};
        const auto longer = [&](int64_t tiles, int64_t shorter) {
            const int64_t most =
                std::min<int64_t>({tiles, size * size / shorter, 2 * kMaxTileGroup, imaged - shorter});
            const int64_t count = (tiles + most - 1) / most;
            return (tiles + count - 1) / count;  // of equal size: the last should not be a sliver
        };
        if (rows < cols) {
            const int64_t few = std::min(size, rows);
            return {few, longer(cols, few)};
        }
        const int64_t few = std::min(size, cols);
        return {longer(rows, few), few};
    }
    // The groups of a pass whose cache, images, and places of so many bytes a tile leave room for the rest.
    static constexpr int64_t kBudget = 62ll << 20;  // bytes of all
    static TileGroupShape shape_within(const Task& task, int64_t left, int64_t most_places,
                                       int64_t place_bytes) {
        const Problem& p = task.problem;
        // Images have two thirds at most, the places the rest.
        const int64_t image_budget = std::min(kImageBudget, place_bytes > 0 ? left * 2 / 3 : left);
        const int64_t images = std::min(image_bytes_of_all(p), image_budget);
        const int64_t tiles = place_bytes > 0 ? std::min(most_places, left - images) / place_bytes
                                              : int64_t(kMaxTileGroup) * kMaxTileGroup;
        const int most = std::min(std::min(task.tuning.tile_group, kMaxTileGroup),
                                  static_cast<int>(std::sqrt(double(tiles))));
        const TileGroupShape largest = group_shape(p, most, image_budget);
        if (!p.square) return largest;
        // Groups of equal size: the last should not be a sliver.
        const int64_t along = tiles_along(p.queries.count), count = (along + largest.rows - 1) / largest.rows;
        return group_shape(p, (along + count - 1) / count, image_budget);
    }
    // What the cache takes of it; a larger one, which the caller asked for, comes on top.
    static int64_t cached_bytes(const Task& task) {
        return caches(task) ? std::min(similarity_bytes(task.problem), kCacheBytes) : 0;
    }
    static constexpr int64_t kPartialBudget = 4ll << 20;      // bytes of partial results
    static constexpr int64_t kSimilarityBudget = 24ll << 20;  // bytes of a tile group's similarities
    static TileGroupShape forward_shape(const Task& task) {
        const Problem& p = task.problem;
        const int64_t extremes = p.mining.on ? extremes_bytes(count_tiles(p), sizeof(Acc)) : 0;
        return shape_within(task, kBudget - kPartialBudget - extremes - cached_bytes(task), kSimilarityBudget,
                            caches(task) ? 0 : kPlaceBytes);
    }
    // Of a tile group's similarities, where not all are kept.
    static int64_t group_similarity_bytes(const Task& task, TileGroupShape shape) {
        return caches(task) ? 0 : shape.tiles() * kPlaceBytes;
    }

    // Slots of row results before they are reduced: one a warp of a merge.
    static int64_t result_slots(const Task& task) {
        return (task.problem.queries.count + kWarpSize - 1) / kWarpSize;
    }
    static int64_t results_size(const Task& task) { return kResultNumbers * result_slots(task); }

    // Blocks that share the tiles where what parameters do to their terms is summed.
    static constexpr int64_t kMostParamSlots = 512;
    static int64_t param_slots(const Task& task) {
        const Problem& p = task.problem;
        return std::min(tiles_along(p.queries.count) * tiles_along(p.refs.count), kMostParamSlots);
    }
    static int64_t param_bytes(const Task& task) {
        return round_up(param_slots(task) * task.learned.count * int64_t(sizeof(double)), 16);
    }

    // Forward's workspace: images, similarities of a tile group, row results, partial results of a tile group, the
    // tiles' extremes.
    static int64_t forward_workspace_bytes(const Task& task) {
        const Problem& p = task.problem;
        const TileGroupShape shape = forward_shape(task);
        int64_t numbers = results_size(task) + partials_size(shape.tiles(), kTile, p.square);
        if (p.mining.on && has_extremes(p)) numbers += 2 * count_tiles(p);
        return image_bytes(p, shape) + group_similarity_bytes(task, shape) + numbers * int64_t(sizeof(Acc));
    }
};

}  // namespace dml::cuda
