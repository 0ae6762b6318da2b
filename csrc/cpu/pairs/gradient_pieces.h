// How the gradient sums of a wave are cut into tasks.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/pairs/tiles.h"
#include "cpu/tasks.h"

namespace dml::cpu {

// Lines [line, line + lines) and dimensions [dim, dim + dims) of the block of owners with number `owner`.
struct GradientPiece {
    int64_t owner, line, lines, dim, dims, work;
};

// Cuts the blocks where there are several threads: into panels of dimensions, then into lines, each block
// into as many pieces as its share of the work deserves. The longest come first, so that no thread starts one
// when the others are done. The order of a sum does not depend on the cut. tile_work(k): the work of tile k
// of the wave.
template <typename TileWork>
std::vector<GradientPiece> cut_gradient(const Owners& owners, int64_t side, int64_t width,
                                        const TileWork& tile_work) {
    constexpr int64_t kDims = 64, kLines = 32, kPiecesPerThread = 4;
    if (width == 0) return {};  // points without dimensions
    std::vector<int64_t> work(owners.size(), 0);
    int64_t total_work = 0;
    for (int64_t k = 0; k < owners.size(); ++k) {
        for (const auto* share = owners.begin(k); share != owners.end(k); ++share)
            work[k] += tile_work(share->tile);
        total_work += work[k];
    }
    const int64_t threads = thread_count();
    std::vector<GradientPiece> pieces;
    for (int64_t k = 0; k < owners.size(); ++k) {
        if (work[k] == 0) continue;
        const int64_t wanted = threads == 1 ? 1 : 1 + work[k] * kPiecesPerThread * threads / total_work;
        const int64_t panels = std::min(wanted, (width + kDims - 1) / kDims);
        const int64_t dims = (width / panels + kDims - 1) / kDims * kDims;
        const int64_t cuts = std::clamp<int64_t>(wanted / panels, 1, side / kLines);
        const int64_t lines = (side / cuts + kLines - 1) / kLines * kLines;
        const int64_t block_lines = owners.lines(k);
        for (int64_t line = 0; line < block_lines; line += lines) {
            for (int64_t dim = 0; dim < width; dim += dims) {
                const int64_t high = std::min(lines, block_lines - line), wide = std::min(dims, width - dim);
                pieces.push_back({k, line, high, dim, wide, work[k] / block_lines * high * wide});
            }
        }
    }
    if (threads > 1) {
        std::stable_sort(pieces.begin(), pieces.end(),
                         [](const GradientPiece& a, const GradientPiece& b) { return a.work > b.work; });
    }
    return pieces;
}

}  // namespace dml::cpu
