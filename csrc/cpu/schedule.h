// Which tiles may run at the same time.
//
// A tile (I, J) adds to the rows of block I and, by symmetry or for the gradient of ref_emb, to those
// of block J. The blocks are gathered into a few groups for each thread; a task is all tiles between
// two groups. The tasks of one round share no group, so a round runs in parallel without locks or
// atomics, and rounds run one after another: every row gets its sums in one fixed order, which depends
// on the number of threads and on nothing else.
//
// Square: the rounds of a round-robin tournament, in which every two groups meet once, after a first
// round of each group with itself. Rectangular: round r pairs group k of the shorter side with group
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
    Schedule(int64_t n, int64_t m, bool square, int64_t threads)
        : square_(square),
          row_blocks_(blocks(n)),
          col_blocks_(blocks(m)),
          row_groups_(std::min(row_blocks_, 2 * threads)),
          col_groups_(std::min(col_blocks_, 2 * threads)) {}

    static int64_t blocks(int64_t n) { return (n + kTile - 1) / kTile; }

    int64_t tiles() const {
        return square_ ? row_blocks_ * (row_blocks_ + 1) / 2 : row_blocks_ * col_blocks_;
    }
    int64_t rounds() const {
        if (row_blocks_ == 0 || col_blocks_ == 0) return 0;
        return square_ ? players() : std::max(row_groups_, col_groups_);
    }
    int64_t round_size(int64_t round) const {
        if (!square_) return std::min(row_groups_, col_groups_);
        return round == 0 ? row_groups_ : players() / 2;
    }

    // The tiles of the k-th task of a round; none where the tournament gives a group a rest.
    template <typename Visit>
    void for_each_tile(int64_t round, int64_t k, const Visit& visit) const {
        int64_t a, b;
        if (!square_) {
            const bool wide = row_groups_ <= col_groups_;
            const int64_t partner = (k + round) % (wide ? col_groups_ : row_groups_);
            a = wide ? k : partner;
            b = wide ? partner : k;
        } else if (round == 0) {
            a = b = k;
        } else {
            const int64_t others = players() - 1;
            const int64_t first = k == 0 ? others : (round - 1 + k) % others;
            const int64_t second = (round - 1 - k + others) % others;
            a = std::min(first, second);
            b = std::max(first, second);
            if (b >= row_groups_) return;
        }
        for (int64_t i = begin(a, row_blocks_, row_groups_); i < begin(a + 1, row_blocks_, row_groups_);
             ++i) {
            for (int64_t j = begin(b, col_blocks_, col_groups_); j < begin(b + 1, col_blocks_, col_groups_);
                 ++j) {
                if (!square_ || i <= j) visit(TileAt{i, j, index(i, j)});
            }
        }
    }

   private:
    int64_t players() const { return row_groups_ + row_groups_ % 2; }  // an odd field gets a phantom
    static int64_t begin(int64_t group, int64_t blocks, int64_t groups) { return group * blocks / groups; }

    int64_t index(int64_t i, int64_t j) const {
        if (!square_) return i * col_blocks_ + j;
        const int64_t distance = j - i;
        return distance * row_blocks_ - distance * (distance - 1) / 2 + i;
    }

    bool square_;
    int64_t row_blocks_, col_blocks_, row_groups_, col_groups_;
};

}  // namespace dml::cpu
