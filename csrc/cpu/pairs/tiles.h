// How the N x M similarities are cut into tiles, and in which order they are visited.
//
// A tile (I, J) serves the rows of block I and, by symmetry or for the gradient of ref_emb, those of block J.
// Tiles are independent: each leaves its results apart, and what belongs to a block is put together
// afterwards in the order of the tiles. So nothing depends on the number of threads. What lies apart is
// bounded by visiting the tiles in waves; a wave follows tile_group-tiles, squares of kTileGroup x kTileGroup
// tiles, so that it has many rows and many columns to share out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels/tile_kernels.h"
#include "cpu/pairs/layout.h"

namespace dml::cpu {

struct TileAt {
    int64_t row_block, col_block;
    int64_t index;  // position among all tiles; in a square those beside the diagonal come first
};

class Tiles {
   public:
    // capacity: the most columns that there may be (of which m take part now).
    Tiles(int64_t n, int64_t m, bool square, int64_t capacity)
        : n(n),
          m(m),
          square(square),
          side(static_cast<int>(tile_side(n, capacity))),
          row_blocks(blocks(n)),
          col_blocks(blocks(m)) {}

    const int64_t n, m;
    const bool square;
    const int side;
    const int64_t row_blocks, col_blocks;

    int64_t blocks(int64_t rows) const { return (rows + side - 1) / side; }
    int64_t area() const { return int64_t(side) * side; }
    int64_t count() const { return tile_count(row_blocks, col_blocks, square); }

    // Blocks of rows and of columns, each up to but not including the second.
    struct TileGroup {
        int64_t i0, i1, j0, j1;
    };

    // Calls visit(tile_group-tile), row by row. Long and narrow matrices have long and narrow
    // tile_group-tiles, of at most `widest` blocks of columns where rectangular.
    template <typename Visit>
    void for_each_tile_group(int64_t widest, const Visit& visit) const {
        const int64_t down = std::min(row_blocks, kTileGroup),
                      across = square
                                   ? kTileGroup
                                   : std::min(kTileGroup * kTileGroup / std::max<int64_t>(down, 1), widest);
        for (int64_t i0 = 0; i0 < row_blocks; i0 += down) {
            for (int64_t j0 = square ? i0 : 0; j0 < col_blocks; j0 += across) {
                visit(TileGroup{i0, std::min(i0 + down, row_blocks), j0, std::min(j0 + across, col_blocks)});
            }
        }
    }

    // Adds the wanted tiles of a tile_group-tile to a wave, and calls visit(wave) whenever it has `most`.
    template <typename Wanted, typename Visit>
    void gather(const TileGroup& tile_group, int64_t most, const Wanted& wanted, std::vector<TileAt>& wave,
                const Visit& visit) const {
        for (int64_t i = tile_group.i0; i < tile_group.i1; ++i) {
            for (int64_t j = square ? std::max(i, tile_group.j0) : tile_group.j0; j < tile_group.j1; ++j) {
                const TileAt at{i, j, index(i, j)};
                if (!wanted(at)) continue;
                if (static_cast<int64_t>(wave.size()) == most) flush(wave, visit);
                wave.push_back(at);
            }
        }
    }
    template <typename Visit>
    static void flush(std::vector<TileAt>& wave, const Visit& visit) {
        if (!wave.empty()) visit(wave);
        wave.clear();
    }

    // Whether a tile_group-tile holds all rows of its columns.
    bool whole_columns() const { return row_blocks <= kTileGroup; }

   private:
    static constexpr int64_t kTileGroup = 16;

    int64_t index(int64_t i, int64_t j) const {
        if (!square) return i * col_blocks + j;
        const int64_t distance = j - i;
        return distance * row_blocks - distance * (distance - 1) / 2 + i;
    }
};

// Which tiles of a wave serve each block, in their order.
class Owners {
   public:
    struct Share {
        int32_t tile;  // position in the wave
        bool as_rows;
    };

    // rows, cols: which sides are wanted. In a square both are blocks of the same points.
    Owners(const std::vector<TileAt>& wave, const Tiles& tiles, bool rows, bool cols)
        : blocks_(rows || tiles.square ? tiles.row_blocks : 0), start_(1, 0) {
        const int64_t all = blocks_ + (tiles.square ? 0 : cols ? tiles.col_blocks : 0);
        std::vector<int32_t> count(all + 1, 0);
        const auto each = [&](const auto& visit) {
            for (size_t k = 0; k < wave.size(); ++k) {
                const TileAt& at = wave[k];
                if (rows) visit(at.row_block, Share{static_cast<int32_t>(k), true});
                if (!cols || (tiles.square && at.row_block == at.col_block)) continue;
                visit((tiles.square ? 0 : blocks_) + at.col_block, Share{static_cast<int32_t>(k), false});
            }
        };
        each([&](int64_t block, Share) { ++count[block + 1]; });
        for (int64_t b = 0; b < all; ++b) count[b + 1] += count[b];
        shares_.resize(count[all]);
        std::vector<int32_t> next(count.begin(), count.end());
        each([&](int64_t block, Share share) { shares_[next[block]++] = share; });
        for (int64_t b = 0; b < all; ++b) {
            if (count[b + 1] == count[b]) continue;
            owner_.push_back(static_cast<int32_t>(b));
            start_.push_back(count[b + 1]);
        }
    }

    int64_t size() const { return static_cast<int64_t>(owner_.size()); }
    // The k-th block that the wave touches: its number, and whether it is one of rows.
    bool is_rows(int64_t k) const { return owner_[k] < blocks_; }
    int64_t block(int64_t k) const { return is_rows(k) ? owner_[k] : owner_[k] - blocks_; }
    const Share* begin(int64_t k) const { return shares_.data() + start_[k]; }
    const Share* end(int64_t k) const { return shares_.data() + start_[k + 1]; }

   private:
    int64_t blocks_;
    std::vector<int32_t> owner_, start_;
    std::vector<Share> shares_;
};

}  // namespace dml::cpu
