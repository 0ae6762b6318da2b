// The passes of forward over the tiles: each visits the wanted tiles in waves, and merges what they leave
// into the rows' accumulators in the order of the tiles, each block of rows by one task.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/pairs/batch.h"
#include "cpu/pairs/row_accumulators.h"

namespace dml::cpu {

// Tiles of one wave: their parts take about 3 MiB.
constexpr int64_t kForwardWave = 256;

template <typename T>
class TilePasses {
   public:
    TilePasses(Batch<T>& batch, const Problem& problem)
        : accumulators(batch.lines, batch.kernels.neg, batch.kernels.pos),
          batch_(batch),
          kernels_(batch.kernels),
          mining_(problem.mining.on),
          mine_self_pair_(!batch.square && problem.mine_self_pair),
          count_nonzero_(kernels_.count == Count::kPairs && problem.reduction == Reduction::kMeanNonzero),
          known_(batch.tiles.count(), 0) {}

    RowAccumulators<T> accumulators;

    // Whether mining sees the self pairs.
    bool mine_self_pair() const { return mine_self_pair_; }

    // min_pos of the rows. wanted(tile): whether the tile is visited.
    template <typename Wanted>
    void find_hardest_positives(const Wanted& wanted) {
        visit_tiles(
            wanted,
            [&](const TileAt& at, TileParts<T>& parts) {
                Tile<T> tile = load(at);
                if (mine_self_pair_) tile.self_col = nullptr;
                kernels_.min_positives(tile, parts);
                return true;
            },
            [&](const LineParts<T>& parts, int64_t first, int lines) {
                T* min_pos = accumulators.min_pos + first;
                for (int i = 0; i < lines; ++i) min_pos[i] = std::min(min_pos[i], parts.pos_a[i]);
            });
    }

    // The accumulators of the given kinds of pairs, within the bounds of the batch's row stats.
    template <typename Wanted>
    void accumulate(const Wanted& wanted, Kinds kinds) {
        const RowStates<T> states = {batch_.row_stats.neg_above, batch_.row_stats.pos_below,
                                     batch_.row_stats.neg_value};
        visit_tiles(
            wanted,
            [&](const TileAt& at, TileParts<T>& parts) {
                const Found found =
                    kernels_.accumulate(load(at), batch_.params, kinds, count_nonzero_, states, parts);
                if (found.gradient) batch_.kept[at.index] = 1;
                return found.parts;
            },
            [&](const LineParts<T>& parts, int64_t first, int lines) { merge(parts, kinds, first, lines); });
    }

    // Zeros the tiles of the cache that no pass computed.
    void clear_unknown_tiles() const { batch_.clear_unknown(known_); }

   private:
    void merge(const LineParts<T>& parts, Kinds kinds, int64_t first, int lines) {
        RowAccumulators<T>& rows = accumulators;
        const bool negatives = kinds != Kinds::kPositives, positives = kinds != Kinds::kNegatives;
        if (negatives || kernels_.pos_in_neg)
            kernels_.merge(kernels_.neg, lines, parts.neg_a, parts.neg_b, rows.neg_a + first,
                           rows.neg_b + first);
        if (negatives && mining_) {
            T* max_neg = rows.max_neg + first;
            for (int i = 0; i < lines; ++i) max_neg[i] = std::max(max_neg[i], parts.max_neg[i]);
        }
        if (!positives && !kernels_.only_negatives) return;
        kernels_.merge(kernels_.pos, lines, parts.pos_a, parts.pos_b, rows.pos_a + first, rows.pos_b + first);
        if (!kernels_.context) return;
        for (int i = 0; i < lines; ++i) rows.pos_context[first + i] += parts.pos_context[i];
    }

    Tile<T> load(const TileAt& at) {
        const Tile<T> tile = batch_.tile(at, known_[at.index]);
        known_[at.index] = 1;
        return tile;
    }

    // Calls work(tile, parts) for every wanted tile, which returns whether it left parts; then, for each
    // block and each such tile in order, merge(parts of the block's lines, first line, lines).
    template <typename Wanted, typename Work, typename Merge>
    void visit_tiles(const Wanted& wanted, const Work& work, const Merge& merge) {
        const auto visit = [&](const std::vector<TileAt>& wave) {
            const int64_t count = wave.size();
            const std::unique_ptr<TileParts<T>[]> parts(new TileParts<T>[count]);
            std::vector<uint8_t> left_parts(count, 0);
            batch_.for_tiles(wave, [&](int64_t k) { left_parts[k] = work(wave[k], parts[k]); });
            const Owners owners(wave, batch_.tiles, true, batch_.both_sides);
            for_tasks(owners.size(), 2 * count * batch_.tiles.side * 16, [&](int64_t k) {
                const int lines = static_cast<int>(owners.lines(k));
                const int64_t first = owners.is_rows(k) ? owners.first(k) : batch_.col_line(owners.first(k));
                for (const auto* share = owners.begin(k); share != owners.end(k); ++share) {
                    if (!left_parts[share->tile]) continue;
                    const TileParts<T>& sides = parts[share->tile];
                    merge(share->as_rows ? sides.rows : sides.cols, first, lines);
                }
            });
        };
        const auto nothing = [](const auto&...) {};
        multiply_ahead(wanted);
        batch_.for_each_wave(kForwardWave, wanted, visit, nothing, nothing);
    }

    // Where there are fewer wanted tiles than threads could share evenly, computes their products before the
    // wave, in column slices finer than tiles. For tiles of the cache only.
    template <typename Wanted>
    void multiply_ahead(const Wanted& wanted) {
        constexpr int64_t kColumns = 32;
        if (batch_.windows || thread_count() == 1) return;
        const int64_t few = 10 * thread_count(), slices = batch_.tiles.side / kColumns;
        std::vector<TileAt> ahead;
        bool many = false;
        batch_.tiles.for_each_tile_group(batch_.tiles.col_blocks, [&](const Tiles::TileGroup& tile_group) {
            if (many) return;
            const auto wanted_ahead = [&](const TileAt& at) {
                return batch_.is_cached(at) && !known_[at.index] && wanted(at);
            };
            batch_.tiles.gather(tile_group, few, wanted_ahead, ahead, [&](auto&) { many = true; });
        });
        if (many) return;
        const int64_t count = ahead.size();
        for_tasks(count * slices, count * batch_.tile_work(), [&](int64_t k) {
            const int64_t from = k % slices * kColumns;
            batch_.multiply(ahead[k / slices], from, from + kColumns);
        });
        for (const TileAt& at : ahead) known_[at.index] = 1;
    }

    Batch<T>& batch_;
    const TileKernels<T>& kernels_;
    const bool mining_, mine_self_pair_, count_nonzero_;
    std::vector<uint8_t> known_;  // [tiles] whether the similarities are computed
};

}  // namespace dml::cpu
