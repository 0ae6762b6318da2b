// Forward's launches on tiles: passes over tile groups.
#pragma once

#include "cuda/pairs/launcher.cuh"

namespace dml::cuda {

// The steps of forward on one tile group, each followed by its merge into the rows.
template <typename Math>
struct ForwardPass {
    using Acc = typename Math::Acc;
    const Launcher<Math>& launcher;
    Partials<Acc> partials;
    Acc* extremes;  // [tiles, 2]; null: not known
    Results<Acc> results;

    void find_hardest(const TileGroup<Acc>& tile_group, MergeStep step) const {
        const Problem& p = launcher.p;
        launcher.multiply(tile_group, TileNeed<Acc>{launcher.arrays.row_stats});
        Look<Acc>::extremes(tile_group, partials, extremes, launcher.launches);
        Merge<Acc>::extremes(tile_group, p.square, launcher.arrays.row_stats, partials, step,
                             Acc(p.mining.epsilon), launcher.launches);
    }
    // second: the positives of a formula with context. stays: the similarities are there from a pass before.
    void gather(const TileGroup<Acc>& tile_group, MergeStep step, bool second, bool stays) const {
        const Problem& p = launcher.p;
        const SavedArrays<Acc>& arrays = launcher.arrays;
        const AnyFormula<Acc> formula = launcher.formula();
        // Where no flag tells which tiles were passed over none is.
        const TileNeed<Acc> need = {arrays.row_stats, extremes, nullptr, second && arrays.kept};
        if (!stays) launcher.multiply(tile_group, need);
        Look<Acc>::sums(tile_group, formula, second, need, partials, arrays.kept, launcher.count_zeros(),
                        p.formula, launcher.launches);
        Merge<Acc>::sums(tile_group, p.square, formula, second, arrays.row_stats, partials, arrays.kept, step,
                         p.mining.on, results, launcher.launches);
    }
};

template <typename Math>
void forward_tiles(const Launcher<Math>& launcher, typename Math::Acc* loss, void* workspace) {
    using Acc = typename Math::Acc;
    using Policy = TilePolicy<Math>;
    const Task& task = launcher.task;
    const Problem& p = launcher.p;
    const TileGroupShape shape = Policy::forward_shape(task);
    const bool mining = p.mining.on;
    auto* bytes = static_cast<unsigned char*>(workspace);
    ImageSlots<Math> images(p, shape, bytes, launcher.launches);
    bytes += Policy::image_bytes(p, shape);
    Acc* const similarities = reinterpret_cast<Acc*>(bytes);
    bytes += Policy::group_similarity_bytes(task, shape);
    const Results<Acc> results = launcher.results(bytes, loss);
    const Partials<Acc> partials = {results.data + Policy::results_size(task)};
    Acc* extremes = mining && Policy::has_extremes(p)
                        ? partials.data + partials_size(shape.tiles(), Policy::kTile, p.square)
                        : nullptr;
    const ForwardPass<Math> pass = {launcher, partials, extremes, results};
    const TileRange rows = launcher.all_rows(), cols = launcher.all_cols();
    // Whether similarities stay from one pass to the next: they are cached, or there is one group.
    const bool stay = launcher.arrays.cache || (shape.rows >= rows.end && shape.cols >= cols.end);
    const auto for_tile_groups = [&](bool multiplies, const auto& f) {
        launcher.for_tile_groups(shape, rows, cols, multiplies ? &images : nullptr, similarities, f);
    };

    launcher.prepare(launcher.queries(), !mining);
    if (!p.square) launcher.prepare(launcher.refs(), false);
    if (mining) {
        for_tile_groups(true,
                        [&](const auto& tile_group, MergeStep step) { pass.find_hardest(tile_group, step); });
    }
    for (int stage = 0; stage < (formula_facts(p.formula).context ? 2 : 1); ++stage) {
        // Where all tiles are multiplied before the first of them is needed again.
        const bool stays = stay && (mining || stage == 1);
        for_tile_groups(!stays, [&](const auto& tile_group, MergeStep step) {
            pass.gather(tile_group, step, stage == 1, stays);
        });
    }
    launcher.reduce(results, loss);
}

}  // namespace dml::cuda
