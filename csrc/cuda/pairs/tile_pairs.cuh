// The pairs of a tile as kernels visit them: which elements are pairs, which are positive, and which thread
// visits which.
//
// A thread visits a grid of kRows x kCols pairs: the numbers of a row or column are loaded once for several
// pairs, and rows merge over 4 lanes, columns over 8, by shuffles. An element that is no pair is NaN; every
// comparison is false, so the loops need no mask.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

// Thread blocks of a kernel that visits pairs per multiprocessor. From sm_120 on shared memory holds one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
template <typename Acc>
inline constexpr int kPairBlocks = 1;
#else
template <typename Acc>
inline constexpr int kPairBlocks = sizeof(Acc) == 8 ? 1 : 2;
#endif

// Shared memory of kernels that visit pairs.
template <typename Acc>
struct TileTraits {
    static constexpr int kTile = kTileSide<Acc>;
    // Rows of similarities are 16 bytes longer than the tile, so that eight rows start in different banks.
    static constexpr int kSimPitch = kTile + kPad<Acc>;
    static constexpr int kTileBytes = kTile * kSimPitch * int(sizeof(Acc));
    static constexpr int kLabels = (kTileBytes + 15) / 16 * 16;
    static constexpr int kNorms = kLabels + 2 * kTile * int(sizeof(int64_t));
    static constexpr int kFlags = kNorms + 2 * kTile * int(sizeof(Acc));
    static constexpr int kEnd =
        kFlags + kWarpSize * int(sizeof(int));  // where the kernels' other arrays begin

    static DML_DEVICE int64_t* labels() { return shared_array<int64_t>(kLabels, 2 * kTile); }
    static DML_DEVICE int* flags() { return shared_array<int>(kFlags, kWarpSize); }
};

// The tile of a block: its similarities and the labels of both sides, in shared memory.
template <typename Acc>
struct LoadedTile {
    int64_t row0, col0;
    Acc* sim;             // [kTile, kSimPitch]
    int64_t* row_labels;  // [kTile]
    int64_t* col_labels;  // [kTile]
};

template <typename AccType>
struct PairGrid {
    using Acc = AccType;
    using Traits = TileTraits<Acc>;
    static constexpr int kTile = Traits::kTile, kLines = 2 * kTile;  // rows, then columns
    static constexpr int kLaneRows = 8, kLaneCols = 4;               // lanes of a warp
    static constexpr int kWarpRows = 2, kWarpCols = kTileThreads / kWarpSize / kWarpRows;
    static constexpr int kRows = kTile / kWarpRows / kLaneRows, kCols = kTile / kWarpCols / kLaneCols;
    static_assert(kLines <= kTileThreads, "a thread for each line");

    // Shared memory, after the tile's.
    static constexpr int kLineNumbers = (Traits::kEnd + 15) / 16 * 16;
    static constexpr int kMaxLineNumbers = 5;
    static constexpr int kScratch = kLineNumbers + kMaxLineNumbers * kLines * int(sizeof(Acc));
    // For each quantity and line, a part from each warp along it.
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

    // The similarities that load_tile has stored. (Through the pointer in LoadedTile the compiler would not
    // know that the memory is shared.)
    static DML_DEVICE Acc& sim(int row, int col) {
        unsigned char* bytes = shared_array<unsigned char>(0, Traits::kTileBytes);
        return reinterpret_cast<Acc*>(bytes)[row * Traits::kSimPitch + col];
    }
    // The thread's pairs in one row.
    struct alignas(16) Sims {
        Acc s[kCols];
    };
    static DML_DEVICE Sims sims(int i) { return reinterpret_cast<const Sims&>(sim(row(i), col(0))); }
    static DML_DEVICE void put_sims(int i, const Sims& s) {
        reinterpret_cast<Sims&>(sim(row(i), col(0))) = s;
    }

    // The labels become ids, in the second half of their place; the first is free then.
    static DML_DEVICE int* ids() { return reinterpret_cast<int*>(Traits::labels()) + kLines; }
    // [kMaxLineNumbers][kLines]
    static DML_DEVICE Acc* line_numbers() {
        return shared_array<Acc>(kLineNumbers, kMaxLineNumbers * kLines);
    }
    static DML_DEVICE Acc* scratch(int quantities) {
        return shared_array<Acc>(kScratch, quantities * kScratchLine);
    }
};

// Whether `value` holds for any thread of the block; every thread gets the answer. Two barriers.
template <typename Acc>
DML_DEVICE bool block_any(bool value) {
    return block_any(value, TileTraits<Acc>::flags());
}

// The largest of all threads' numbers.
template <typename Acc>
DML_DEVICE Acc block_max(Acc x, Acc* shared) {
    constexpr int kWarps = kTileThreads / kWarpSize, kAtOnce = 16 / int(sizeof(Acc));
    x = warp_max(x);
    if (lane_id() == 0) shared[warp_id()] = x;
    block_sync();
    const auto* chunks = reinterpret_cast<const Vector<Acc, kAtOnce>*>(shared);  // aligned to 16 bytes
#pragma unroll
    for (int w = 0; w < kWarps / kAtOnce; ++w) {
        const auto y = chunks[w];
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) x = std::fmax(x, y.value[e]);
    }
    return x;
}

// exp(x) for x up to about 0, to 2^-23 (1 + |x|).
template <typename Acc>
DML_DEVICE Acc quick_exp(Acc x) {
    if constexpr (sizeof(Acc) == 4) {
        return exp2_approx(x * 1.44269504f);
    } else {
        return std::exp(x);
    }
}

// Ids of 32 bits, equal where the labels of the tile's lines are: the labels' lower halves where all upper
// halves agree, else the first line that has the label.
template <typename Acc>
DML_DEVICE void number_labels(const LoadedTile<Acc>& tile) {
    using Grid = PairGrid<Acc>;
    const int line = int(threadIdx.x);
    const int64_t* labels = tile.row_labels;  // the columns' follow
    const int64_t label = line < Grid::kLines ? labels[line] : labels[0];
    int id = int(uint32_t(label));
    if (block_any<Acc>((label ^ labels[0]) >> 32 != 0)) {
        id = 0;
        while (labels[id] != label) ++id;
    }
    block_sync();  // the labels have been read
    if (line < Grid::kLines) Grid::ids()[line] = id;
    block_sync();
}

// Sets elements that are no pair to NaN: past the edges and, where square, on the diagonal and left of it.
template <typename Acc>
DML_DEVICE void mark_edges(const TileGroup<Acc>& tile_group, const LoadedTile<Acc>& tile) {
    using Traits = TileTraits<Acc>;
    constexpr int kTile = Traits::kTile;
    const int64_t rows = tile_group.rows.count - tile.row0, cols = tile_group.cols.count - tile.col0;
    const bool diagonal = tile_group.square && tile.row0 == tile.col0;
    if (rows >= kTile && cols >= kTile && !diagonal) return;
    block_sync();  // the similarities have been read for the cache
    for (int e = int(threadIdx.x); e < kTile * kTile; e += kTileThreads) {
        const int r = e / kTile, c = e % kTile;
        if (r >= rows || c >= cols || (diagonal && c <= r)) PairGrid<Acc>::sim(r, c) = not_a_number<Acc>();
    }
    block_sync();
}

// Sets the pair of a row and itself to NaN, where that is a positive.
template <typename Acc>
DML_DEVICE void mark_self(const TileGroup<Acc>& tile_group, const LoadedTile<Acc>& tile) {
    constexpr int kTile = TileTraits<Acc>::kTile;
    if (!tile_group.self_index) return;
    block_sync();
    const int r = int(threadIdx.x);
    if (r < kTile && tile.row0 + r < tile_group.rows.count) {
        const int64_t self = tile_group.self_index[tile.row0 + r];
        if (self >= tile.col0 && self < tile.col0 + kTile) {
            const int c = int(self - tile.col0);
            if (tile.row_labels[r] == tile.col_labels[c]) PairGrid<Acc>::sim(r, c) = not_a_number<Acc>();
        }
    }
    block_sync();
}

// The similarities, labels and norms of a tile.
template <typename Acc>
DML_DEVICE LoadedTile<Acc> load_tile(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj) {
    using Traits = TileTraits<Acc>;
    constexpr int kTile = Traits::kTile;
    Acc* sim = reinterpret_cast<Acc*>(shared_array<unsigned char>(0, Traits::kTileBytes));
    WholeBoxes<Acc, kTile, kTile, kTile, Traits::kSimPitch, kTileThreads>(tile_group.similarities_of(ti, tj))
        .start(sim, 0);
    cp_async_commit();
    int64_t* labels = Traits::labels();
    Acc* norms = shared_array<Acc>(Traits::kNorms, 2 * kTile);
    static_assert(2 * kTile <= kTileThreads, "a thread for each line");
    if (int(threadIdx.x) < 2 * kTile) {
        const int t = int(threadIdx.x);
        const bool is_row = t < kTile;
        const int64_t i = line_of_thread(tile_group, ti, tj);
        labels[t] = i >= 0 ? (is_row ? tile_group.rows : tile_group.cols).labels[i] : 0;
        norms[t] = i >= 0 ? (is_row ? tile_group.rows : tile_group.cols).norms[i] : Acc(0);
    }
    cp_async_wait<0>();
    block_sync();
    return {ti * kTile, tj * kTile, sim, labels, labels + kTile};
}

// A tile whose pairs can be visited. for_mining: pairs of rows and themselves stay where mine_self_pair says
// so.
template <typename Acc>
DML_DEVICE LoadedTile<Acc> load_pairs(const TileGroup<Acc>& tile_group, int64_t ti, int64_t tj,
                                      bool for_mining) {
    const LoadedTile<Acc> tile = load_tile(tile_group, ti, tj);
    mark_edges(tile_group, tile);
    if (!for_mining || !tile_group.mine_self_pair) mark_self(tile_group, tile);
    number_labels(tile);
    return tile;
}

// The label ids of a thread's columns. Most rows of most tiles hold no positive: a warp vote over its 8 rows
// and 32 columns skips them.
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

// Merges a row's values over the lanes that share the row.
template <typename Grid, typename T, typename Merge>
DML_DEVICE T merge_lanes(T x, const Merge& merge) {
#pragma unroll
    for (int m = 1; m < Grid::kLaneCols; m *= 2) x = merge(x, shfl_xor(x, m));
    return x;
}

// Merges quantities over warps, through shared memory: a line has a part from each warp along it.
template <typename Grid, typename Acc = typename Grid::Acc>
struct WarpExchange {
    Acc* data;  // [quantities][kScratchLine]

    DML_DEVICE void put_row(int quantity, int i, Acc x) const {
        if (lane_id() % Grid::kLaneCols != 0) return;
        const int part = warp_id() % Grid::kWarpCols;
        data[quantity * Grid::kScratchLine + part * Grid::kTile + Grid::row(i)] = x;
    }
    // x: a value for each of the thread's columns. In each round two lanes that share columns split them,
    // until every lane has one; the order of merging is the same for all columns.
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
                const Acc sent = upper ? rest[j] : rest[n + j], kept = upper ? rest[n + j] : rest[j];
                rest[j] = merge(kept, shfl_xor(sent, mask));
            }
            first += upper ? n : 0;
        }
        for (; mask < kWarpSize; mask *= 2) rest[0] = merge(rest[0], shfl_xor(rest[0], mask));
        if (lane_id() >> (2 + kRounds) == 0) at_col(quantity, first) = rest[0];
    }
    // The same value for each column.
    DML_DEVICE void put_every_col(int quantity, Acc x) const {
        at_col(quantity, lane_id() / Grid::kLaneCols % Grid::kCols) = x;
    }
    DML_DEVICE Acc& at_col(int quantity, int j) const {
        const int part = Grid::kWarpCols + warp_id() / Grid::kWarpCols;
        return data[quantity * Grid::kScratchLine + part * Grid::kTile + Grid::col(j)];
    }
    // After a barrier; line: a row, or kTile + a column.
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

struct Minimum {
    template <typename T>
    DML_DEVICE T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};
struct Maximum {
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
