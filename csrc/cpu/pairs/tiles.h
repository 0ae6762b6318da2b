// The tiles of the N x M similarities, and the order in which they are visited.
//
// Tile (I, J) serves the rows of block I and, by symmetry or for the gradient of ref_emb, those of block J.
// Each tile leaves its results in its own memory; the results of a block are then merged in the order of the
// tiles, so nothing depends on the number of threads. Visiting the tiles in waves bounds that memory. A wave
// follows tile groups, squares of kTileGroup x kTileGroup tiles, so that it has many row blocks and many
// column blocks to distribute.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels/tile_kernels.h"
#include "cpu/pairs/layout.h"

namespace dml::cpu {

struct TileAt {
    int64_t row_block, col_block;
    int64_t index;  // position among all tiles; in a square those near the diagonal come first
};

class Tiles {
   public:
    // capacity: rows of ref_emb, of which m take part.
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

    // Row blocks [i0, i1) and column blocks [j0, j1).
    struct TileGroup {
        int64_t i0, i1, j0, j1;
    };

    // Calls visit(group), row by row. Long and narrow matrices have long and narrow groups. Where
    // rectangular, a group has at most `widest` column blocks.
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

    // Adds the wanted tiles of a group to a wave, and calls visit(wave) whenever it is full, with `most`
    // tiles.
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

    // Whether a tile group holds all rows of its columns.
    bool whole_columns() const { return row_blocks <= kTileGroup; }

   private:
    static constexpr int64_t kTileGroup = 16;

    int64_t index(int64_t i, int64_t j) const {
        if (!square) return i * col_blocks + j;
        const int64_t distance = j - i;
        return distance * row_blocks - distance * (distance - 1) / 2 + i;
    }
};

// The blocks that the tiles of a wave serve, and for each its tiles in order: one task owns a block.
class Owners {
   public:
    struct Share {
        int32_t tile;  // position in the wave
        bool as_rows;  // whether the tile's rows are the block's lines, else its columns
    };

    // rows, cols: which sides are wanted. In a square both are blocks of the same points.
    Owners(const std::vector<TileAt>& wave, const Tiles& tiles, bool rows, bool cols)
        : tiles_(tiles), blocks_(rows || tiles.square ? tiles.row_blocks : 0), start_(1, 0) {
        const int64_t all = blocks_ + (tiles.square ? 0 : cols ? tiles.col_blocks : 0);
        std::vector<int32_t> count(all + 1, 0);
        const auto for_each_share = [&](const auto& visit) {
            for (size_t k = 0; k < wave.size(); ++k) {
                const TileAt& at = wave[k];
                if (rows) visit(at.row_block, Share{static_cast<int32_t>(k), true});
                if (!cols || (tiles.square && at.row_block == at.col_block)) continue;
                visit((tiles.square ? 0 : blocks_) + at.col_block, Share{static_cast<int32_t>(k), false});
            }
        };
        for_each_share([&](int64_t block, Share) { ++count[block + 1]; });
        for (int64_t b = 0; b < all; ++b) count[b + 1] += count[b];
        shares_.resize(count[all]);
        std::vector<int32_t> next(count.begin(), count.end());
        for_each_share([&](int64_t block, Share share) { shares_[next[block]++] = share; });
        for (int64_t b = 0; b < all; ++b) {
            if (count[b + 1] == count[b]) continue;
            owner_.push_back(static_cast<int32_t>(b));
            start_.push_back(count[b + 1]);
        }
    }

    int64_t size() const { return static_cast<int64_t>(owner_.size()); }
    // The k-th block: whether it is a row block, its first line, and its number of lines.
    bool is_rows(int64_t k) const { return owner_[k] < blocks_; }
    int64_t first(int64_t k) const { return (is_rows(k) ? owner_[k] : owner_[k] - blocks_) * tiles_.side; }
    int64_t lines(int64_t k) const {
        return std::min<int64_t>(tiles_.side, (is_rows(k) ? tiles_.n : tiles_.m) - first(k));
    }
    const Share* begin(int64_t k) const { return shares_.data() + start_[k]; }
    const Share* end(int64_t k) const { return shares_.data() + start_[k + 1]; }

   private:
    const Tiles& tiles_;
    int64_t blocks_;
    std::vector<int32_t> owner_, start_;
    std::vector<Share> shares_;
};

}  // namespace dml::cpu
