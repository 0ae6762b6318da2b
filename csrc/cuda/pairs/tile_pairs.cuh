// The pairs of a tile, as the kernels visit them: which of the tile's elements are pairs, which are positive,
// and which thread looks at which.
//
// A thread looks at a grid of kRows x kCols pairs, so that what a row or column has is loaded once for
// several pairs, and rows merge over 4 lanes, columns over 8, by shuffles. An element that is no pair holds
// NaN, which no bound keeps: so nothing inside the loops asks.
#pragma once

#include "cuda/pairs/statistics.cuh"
#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

template <typename Math>
struct PairGrid {
    using Traits = TileTraits<Math>;
    using Acc = typename Math::Acc;
    static constexpr int kTile = Traits::kTile, kLines = 2 * kTile;  // rows, then columns
    static constexpr int kLaneRows = 8, kLaneCols = 4;               // lanes of a warp
    static constexpr int kWarpRows = 2, kWarpCols = Traits::kThreads / kWarpSize / kWarpRows;
    static constexpr int kRows = kTile / kWarpRows / kLaneRows, kCols = kTile / kWarpCols / kLaneCols;
    static_assert(kLines <= Traits::kThreads, "a thread for each line");

    // Shared memory, behind the tile's.
    static constexpr int kIds = Traits::kEnd;
    static constexpr int kLineNumbers = (kIds + kLines * int(sizeof(int)) + 15) / 16 * 16;
    static constexpr int kMaxLineNumbers = 5;
    static constexpr int kScratch = kLineNumbers + kMaxLineNumbers * kLines * int(sizeof(Acc));
    // For each quantity and line, the part of each warp along it.
    static constexpr int kScratchLine = kWarpCols * kTile + kWarpRows * kTile;
    static constexpr int shared_bytes(int quantities) {
        return kScratch + quantities * kScratchLine * int(sizeof(Acc));
    }

    static DML_DEVICE int row(int i) {
        return warp_id() / kWarpCols * (kTile / kWarpRows) + lane_id() / kLaneCols + i * kLaneRows;
    }
    static DML_DEVICE int col(int j) {
        return warp_id() % kWarpCols * (kTile / kWarpCols) + lane_id() % kLaneCols * kCols + j;
    }

    // The similarities, where load_tile has put them. (Not by the pointer in LoadedTile, of which the
    // compiler would not see that it leads to shared memory.)
    static DML_DEVICE Acc& sim(int row, int col) {
        unsigned char* bytes = shared_array<unsigned char>(0, Traits::kTileBytes);
        return reinterpret_cast<Acc*>(bytes)[row * Traits::kSimPitch + col];
    }
    // A thread's own pairs in one row.
    struct alignas(16) Sims {
        Acc s[kCols];
    };
    static DML_DEVICE Sims sims(int i) { return reinterpret_cast<const Sims&>(sim(row(i), col(0))); }

    static DML_DEVICE int* ids() { return shared_array<int>(kIds, kLines); }
    // [kMaxLineNumbers][kLines]
    static DML_DEVICE Acc* line_numbers() {
        return shared_array<Acc>(kLineNumbers, kMaxLineNumbers * kLines);
    }
    static DML_DEVICE Acc* scratch(int quantities) {
        return shared_array<Acc>(kScratch, quantities * kScratchLine);
    }
};

// Whether it holds for any thread of the block; every thread gets the answer. Two barriers.
template <typename Math>
DML_DEVICE bool block_any(bool own) {
    using Traits = TileTraits<Math>;
    int* flags = shared_array<int>(Traits::kFlags, kWarpSize);
    own = warp_any(own);
    block_sync();  // whoever used the flags before has done so
    if (lane_id() == 0) flags[warp_id()] = own ? 1 : 0;
    block_sync();
    int any = 0;
    for (int w = 0; w < Traits::kThreads / kWarpSize; ++w) any |= flags[w];
    return any != 0;
}

// The row or column that a thread stands for, or -1.
template <typename Math, typename T, typename Acc>
DML_DEVICE int64_t line_of_thread(const TileGroup<T, Acc>& tile_group, int64_t ti, int64_t tj) {
    constexpr int kTile = TileTraits<Math>::kTile;
    const int line = int(threadIdx.x);
    if (line >= 2 * kTile) return -1;
    const bool is_row = line < kTile;
    const int64_t i = is_row ? ti * kTile + line : tj * kTile + line - kTile;
    return i < (is_row ? tile_group.rows : tile_group.cols).points.rows ? i : -1;
}

// Numbers of 32 bits that are equal where the labels of the tile's lines are: their lower halves where all
// upper halves agree, else the first line that has the label.
template <typename Math>
DML_DEVICE void number_labels(const LoadedTile<Math>& tile) {
    using Grid = PairGrid<Math>;
    const int line = int(threadIdx.x);
    const int64_t* labels = tile.row_labels;  // the columns' follow
    const int64_t own = line < Grid::kLines ? labels[line] : labels[0];
    int id = int(uint32_t(own));
    if (block_any<Math>((own ^ labels[0]) >> 32 != 0)) {  // rare: labels beyond 32 bits
        id = 0;
        while (labels[id] != own) ++id;
    }
    if (line < Grid::kLines) Grid::ids()[line] = id;
    block_sync();
}

// Marks what is no pair: past the edges and, where square, on the diagonal and left of it.
template <typename Math, typename T, typename Acc>
DML_DEVICE void mark_edges(const TileGroup<T, Acc>& tile_group, const LoadedTile<Math>& tile) {
    using Traits = TileTraits<Math>;
    constexpr int kTile = Traits::kTile;
    const int64_t rows = tile_group.rows.points.rows - tile.row0,
                  cols = tile_group.cols.points.rows - tile.col0;
    const bool diagonal = tile_group.square && tile.row0 == tile.col0;
    if (rows >= kTile && cols >= kTile && !diagonal) return;
    block_sync();  // the cache has been filled with what the similarities were
    for (int e = int(threadIdx.x); e < kTile * kTile; e += Traits::kThreads) {  // rare: edges, diagonal
        const int r = e / kTile, c = e % kTile;
        if (r >= rows || c >= cols || (diagonal && c <= r)) PairGrid<Math>::sim(r, c) = not_a_number<Acc>();
    }
    block_sync();
}

// Marks the pair of a row and itself, where that is a positive.
template <typename Math, typename T, typename Acc>
DML_DEVICE void mark_self(const TileGroup<T, Acc>& tile_group, const LoadedTile<Math>& tile) {
    constexpr int kTile = TileTraits<Math>::kTile;
    if (!tile_group.self_index) return;
    block_sync();
    const int r = int(threadIdx.x);
    if (r < kTile && tile.row0 + r < tile_group.rows.points.rows) {  // rare: rows among the references
        const int64_t self = tile_group.self_index[tile.row0 + r];
        if (self >= tile.col0 && self < tile.col0 + kTile) {
            const int c = int(self - tile.col0);
            if (tile.row_labels[r] == tile.col_labels[c]) PairGrid<Math>::sim(r, c) = not_a_number<Acc>();
        }
    }
    block_sync();
}

// A tile ready to be looked at. for_mining: as mining sees it, with the pairs of rows and themselves where it
// is told to.
template <typename Math, typename T, typename Acc>
DML_DEVICE LoadedTile<Math> load_pairs(const TileGroup<T, Acc>& tile_group, int64_t ti, int64_t tj,
                                       bool for_mining) {
    const LoadedTile<Math> tile = load_tile<Math>(tile_group, ti, tj);
    mark_edges<Math>(tile_group, tile);
    if (!for_mining || !tile_group.mine_self_pair) mark_self<Math>(tile_group, tile);
    number_labels<Math>(tile);
    return tile;
}

// The labels' numbers of a thread's columns. Most rows of most tiles hold no positive, of which the threads
// of a warp, who look at 8 rows and 32 columns at a time, convince themselves together.
template <typename Grid>
struct ColumnIds {
    int ids[Grid::kCols];

    DML_DEVICE ColumnIds() {
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j) ids[j] = Grid::ids()[Grid::kTile + Grid::col(j)];
    }
    DML_DEVICE bool positive(int j, int row_id) const { return ids[j] == row_id; }
    DML_DEVICE bool any_positive(int row_id) const {
        bool any = false;
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j) any = any || positive(j, row_id);
        return warp_any(any);
    }
};

// Merges what threads hold of a row over the lanes of that row.
template <typename Grid, typename T, typename Merge>
DML_DEVICE T over_row(T x, const Merge& merge) {
#pragma unroll
    for (int m = 1; m < Grid::kLaneCols; m *= 2) x = merge(x, shfl_xor(x, m));
    return x;
}

// Where the warps' parts of one quantity meet: a row has a part for each warp along it, a column likewise.
template <typename Grid, typename Acc = typename Grid::Acc>
struct Meeting {
    Acc* data;  // [quantities][kScratchLine]

    DML_DEVICE void put_row(int quantity, int i, Acc x) const {
        if (lane_id() % Grid::kLaneCols != 0) return;
        const int part = warp_id() % Grid::kWarpCols;
        data[quantity * Grid::kScratchLine + part * Grid::kTile + Grid::row(i)] = x;
    }
    // x: of each of the thread's columns. Lanes that share these halve, with each merger, the columns that
    // they go on with, until there are no more than lanes; the order of the merging is the same for all.
    template <typename Merge>
    DML_DEVICE void put_cols(int quantity, const Acc (&x)[Grid::kCols], const Merge& merge) const {
        constexpr int kRounds = Grid::kCols == 8 ? 3 : 2;
        static_assert(Grid::kCols == 1 << kRounds && Grid::kLaneRows == 8, "as the lanes share columns");
        Acc rest[Grid::kCols];
#pragma unroll
        for (int j = 0; j < Grid::kCols; ++j) rest[j] = x[j];
        int first = 0, mask = Grid::kLaneCols;
#pragma unroll
        for (int n = Grid::kCols / 2; n >= 1; n /= 2, mask *= 2) {
            const bool upper = (lane_id() & mask) != 0;
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const Acc give = upper ? rest[j] : rest[n + j], keep = upper ? rest[n + j] : rest[j];
                rest[j] = merge(keep, shfl_xor(give, mask));
            }
            first += upper ? n : 0;
        }
        for (; mask < kWarpSize; mask *= 2) rest[0] = merge(rest[0], shfl_xor(rest[0], mask));
        if (lane_id() >> (2 + kRounds) == 0) at_col(quantity, first) = rest[0];
    }
    // The same number for each of them.
    DML_DEVICE void put_every_col(int quantity, Acc x) const {
        at_col(quantity, lane_id() / Grid::kLaneCols % Grid::kCols) = x;
    }
    DML_DEVICE Acc& at_col(int quantity, int j) const {
        const int part = Grid::kWarpCols + warp_id() / Grid::kWarpCols;
        return data[quantity * Grid::kScratchLine + part * Grid::kTile + Grid::col(j)];
    }
    // After a barrier: line is a row, or kTile + a column.
    template <typename Merge>
    DML_DEVICE Acc get(int quantity, int line, const Merge& merge) const {
        const bool is_row = line < Grid::kTile;
        const Acc* parts = data + quantity * Grid::kScratchLine + line;
        if (!is_row) parts += (Grid::kWarpCols - 1) * Grid::kTile;
        Acc x = parts[0];
        for (int p = 1; p < (is_row ? Grid::kWarpCols : Grid::kWarpRows); ++p)
            x = merge(x, parts[p * Grid::kTile]);
        return x;
    }
};

struct Least {
    template <typename T>
    DML_DEVICE T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};
struct Greatest {
    template <typename T>
    DML_DEVICE T operator()(T a, T b) const {
        return b > a ? b : a;
    }
};
struct Plus {
    template <typename T>
    DML_DEVICE T operator()(T a, T b) const {
        return a + b;
    }
};

}  // namespace dml::cuda
