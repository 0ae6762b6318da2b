// Which tiles may run at the same time.
//
// A tile (I, J) adds to the rows of block I and, by symmetry or for the gradient of ref_emb, to those
// of block J. Tiles of one round share no block, so a round runs in parallel without locks or atomics;
// rounds run one after another, so each row gets its sums in one fixed order, whatever the number of
// threads.
//
// Square: the rounds of a round-robin tournament, in which every two blocks meet once, after a first
// round of the diagonal tiles. Rectangular: round r pairs block k of the shorter side with block
// k + r of the longer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tile_kernels.h"

namespace dml::cpu {

struct TileAt {
    int64_t row_block, col_block;
    int64_t index;  // position among all tiles; those beside the diagonal come first
};

class Schedule {
   public:
    Schedule(int64_t n, int64_t m, bool square) : square_(square), rows_(blocks(n)), cols_(blocks(m)) {}

    static int64_t blocks(int64_t n) { return (n + kTile - 1) / kTile; }

    int64_t row_blocks() const { return rows_; }
    int64_t col_blocks() const { return cols_; }
    int64_t tiles() const { return square_ ? rows_ * (rows_ + 1) / 2 : rows_ * cols_; }
    int64_t rounds() const {
        if (rows_ == 0 || cols_ == 0) return 0;
        return square_ ? 1 + (players() - 1) : std::max(rows_, cols_);
    }
    int64_t round_size(int64_t round) const {
        if (!square_) return std::min(rows_, cols_);
        return round == 0 ? rows_ : players() / 2;
    }
    // The k-th tile of a round; false where the tournament gives a block a rest.
    bool tile(int64_t round, int64_t k, TileAt& at) const {
        if (!square_) {
            const bool wide = rows_ <= cols_;
            const int64_t partner = (k + round) % (wide ? cols_ : rows_);
            at.row_block = wide ? k : partner;
            at.col_block = wide ? partner : k;
            at.index = round * std::min(rows_, cols_) + k;
            return true;
        }
        if (round == 0) {
            at = {k, k, k};
            return true;
        }
        const int64_t others = players() - 1;
        const int64_t a = k == 0 ? others : (round - 1 + k) % others;
        const int64_t b = (round - 1 - k + others) % others;
        at.row_block = std::min(a, b);
        at.col_block = std::max(a, b);
        if (at.col_block >= rows_) return false;
        const int64_t distance = at.col_block - at.row_block;
        at.index = distance * rows_ - distance * (distance - 1) / 2 + at.row_block;
        return true;
    }

   private:
    int64_t players() const { return rows_ + rows_ % 2; }  // an odd field gets a phantom
    bool square_;
    int64_t rows_, cols_;
};

}  // namespace dml::cpu
