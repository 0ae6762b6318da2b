// Forward's launches on tiles: passes over tile groups.
#pragma once

#include "cuda/pairs/accumulate.cuh"
#include "cuda/pairs/launcher.cuh"

namespace dml::cuda {

// The steps of forward on one tile group, each followed by its merge into the rows.
template <typename Math>
struct ForwardPass {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    const Launcher<Math>& launcher;
    Partials<Acc> partials;
    Acc* extremes;  // [tiles, 2]; null: not known
    Results<Acc> results;

    void find_hardest(const TileGroup<T, Acc>& tile_group, MergeStep step) const {
        const Problem& p = launcher.p;
        launch_dependent(find_extremes<Math>, launcher.tile_grid(tile_group),
                         dim3(TileTraits<Math>::kThreads), PairGrid<Math>::shared_bytes(2), launcher.stream,
                         tile_group, partials, extremes);
        Merge<Acc>::extremes(Merge<Acc>::without_points(tile_group), p.square, launcher.arrays.row_stats,
                             partials, step, Acc(p.mining.epsilon), launcher.stream);
    }
    // second: the positives of a formula with context.
    void gather(const TileGroup<T, Acc>& tile_group, MergeStep step, bool second) const {
        const Problem& p = launcher.p;
        const SavedArrays<Acc>& arrays = launcher.arrays;
        const AnyFormula<Acc> formula = launcher.formula();
        launch_dependent(accumulate<Math>, launcher.tile_grid(tile_group), dim3(TileTraits<Math>::kThreads),
                         PairGrid<Math>::shared_bytes(most_summed(p.formula)), launcher.stream, tile_group,
                         formula, second, arrays.row_stats, partials, extremes, arrays.kept,
                         launcher.count_zeros());
        Merge<Acc>::sums(Merge<Acc>::without_points(tile_group), p.square, formula, second, arrays.row_stats,
                         partials, arrays.kept, step, p.mining.on, results, launcher.stream);
    }
};

template <typename Math>
void forward_tiles(const Launcher<Math>& launcher, typename Math::Acc* loss, void* workspace,
                   Previous previous) {
    using Acc = typename Math::Acc;
    using Policy = TilePolicy<Math>;
    const Task& task = launcher.task;
    const Problem& p = launcher.p;
    const TileGroupShape shape = Policy::forward_shape(task);
    const bool mining = p.mining.on;
    const Results<Acc> results = launcher.results(workspace, loss);
    const Partials<Acc> partials = {results.data + Policy::results_size(task)};
    Acc* extremes = mining && Policy::has_extremes(p)
                        ? partials.data + partials_size(shape.tiles(), Policy::kTile, p.square)
                        : nullptr;
    const ForwardPass<Math> pass = {launcher, partials, extremes, results};
    const auto for_tile_groups = [&](const auto& f) {
        launcher.for_tile_groups(shape, launcher.all_rows(), launcher.all_cols(), f);
    };

    launcher.prepare(!mining, previous);
    if (mining)
        for_tile_groups([&](const auto& tile_group, MergeStep step) { pass.find_hardest(tile_group, step); });
    for (int stage = 0; stage < (formula_facts(p.formula).context ? 2 : 1); ++stage) {
        for_tile_groups([&](auto tile_group, MergeStep step) {
            tile_group.cache_filled = tile_group.cache && (mining || stage == 1);
            pass.gather(tile_group, step, stage == 1);
        });
    }
    launcher.reduce(results, loss);
}

}  // namespace dml::cuda
