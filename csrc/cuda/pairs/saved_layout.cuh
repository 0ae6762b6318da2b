// Tiles: where forward leaves what backward needs: numbers, the tiles' similarities if they are cached, then flags.
#pragma once

#include "cuda/pairs/tile_policy.cuh"

namespace dml::cuda {

// The arrays that kernels of both passes share.
template <typename Acc>
struct SavedArrays {
    RowStats<Acc> row_stats;
    Acc *query_norms, *ref_norms;  // the same array where square
    Acc* cache;                    // the tiles' similarities; null: not cached
    uint8_t* kept;                 // [tiles] flags; null: every tile is visited
};

template <typename Math>
struct SavedLayout {
    using Acc = typename Math::Acc;
    using Policy = TilePolicy<Math>;
    const Task& task;

    TileSizes<int64_t> sizes() const {
        const Problem& p = task.problem;
        return {p.queries.count, p.refs.count, p.square, sizeof(Acc), task.tuning.cache_bytes};
    }
    int64_t bytes() const { return sizes().bytes; }

    SavedArrays<Acc> arrays(unsigned char* saved) const {
        const Problem& p = task.problem;
        const int64_t n = p.queries.count;
        const TileSizes<int64_t> at = sizes();
        Acc* header = reinterpret_cast<Acc*>(saved);
        Acc* a = header + kHeader;
        Acc* norms = a + kStatsPerRow * n;
        const RowStats<Acc> row_stats = {header,    a,         a + n,     a + 2 * n,
                                         a + 3 * n, a + 4 * n, a + 5 * n, saved + at.flags};
        Acc* cache = at.caches ? reinterpret_cast<Acc*>(saved + at.similarities) : nullptr;
        uint8_t* kept = Policy::has_kept(p) ? saved + at.kept : nullptr;
        return {row_stats, norms, p.square ? norms : norms + n, cache, kept};
    }
};

}  // namespace dml::cuda
