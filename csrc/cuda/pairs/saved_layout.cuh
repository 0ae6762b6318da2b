// Where forward leaves what backward needs: numbers, the tiles' similarities if they are cached, then flags.
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
    bool saves;  // whether a backward may follow

    int64_t numbers() const {
        const Problem& p = task.problem;
        return kHeader + (kStatsPerRow + 1) * p.queries.count + (p.square ? 0 : p.refs.count);
    }
    bool caches() const { return saves && Policy::caches(task); }
    int64_t cache_offset() const { return (numbers() * int64_t(sizeof(Acc)) + 15) / 16 * 16; }
    int64_t flags_offset() const {
        return cache_offset() + (caches() ? Policy::similarity_bytes(task.problem) : 0);
    }
    int64_t kept_offset() const { return flags_offset() + task.problem.queries.count; }
    int64_t bytes() const {
        const bool kept = !Policy::uses_row_blocks(task) && Policy::has_kept(task.problem);
        return (kept_offset() + (kept ? Policy::count_tiles(task.problem) : 0) + 15) / 16 * 16;
    }

    SavedArrays<Acc> arrays(unsigned char* saved) const {
        const Problem& p = task.problem;
        const int64_t n = p.queries.count;
        Acc* header = reinterpret_cast<Acc*>(saved);
        Acc* a = header + kHeader;
        Acc* norms = a + kStatsPerRow * n;
        const RowStats<Acc> row_stats = {header,    a,         a + n,     a + 2 * n,
                                         a + 3 * n, a + 4 * n, a + 5 * n, saved + flags_offset()};
        Acc* cache = caches() ? reinterpret_cast<Acc*>(saved + cache_offset()) : nullptr;
        uint8_t* kept = Policy::has_kept(p) ? saved + kept_offset() : nullptr;
        return {row_stats, norms, p.square ? norms : norms + n, cache, kept};
    }
};

}  // namespace dml::cuda
