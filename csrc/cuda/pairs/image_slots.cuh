// Which points have images at the moment, for a pass over tile groups: all, or the rows and columns of the tile group.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/pairs/tile_policy.cuh"

namespace dml::cuda {

template <typename Math>
class ImageSlots {
    using T = typename Math::Value;
    using Acc = typename Math::Acc;
    using Policy = TilePolicy<Math>;
    using Layout = PointsLayout<Math>;

    struct Slot {
        unsigned char* memory;
        int64_t tiles;            // room for so many
        TileRange held = {0, 0};  // what is there

        Image image(int64_t dim) const {
            const auto* scales = reinterpret_cast<const float*>(memory + tiles * Layout::tile_bytes(dim));
            return {memory, PartsOf<Math>::kScaled ? scales : nullptr, static_cast<int>(Layout::across(dim))};
        }
    };
    const bool square_, whole_;
    Launches& launches_;
    Slot slots_[2];  // of rows and of columns

    // The image of these tiles of a side.
    Image bring(int side, const Rows<T, Acc>& rows, TileRange wanted) {
        const int64_t dim = rows.points.cols;
        const auto holds = [&](const Slot& slot) {
            return slot.held.begin <= wanted.begin && wanted.end <= slot.held.end;
        };
        // Columns that are rows of the group as well have their image.
        Slot& slot = slots_[square_ && (whole_ || holds(slots_[0])) ? 0 : side];
        if (!holds(slot)) {
            slot.held = whole_ ? TileRange{0, Policy::tiles_along(rows.points.rows)} : wanted;
            const int64_t lines = (slot.held.end - slot.held.begin) * Policy::kTile;
            const Image image = slot.image(dim);
            launches_(write_image<Math>, dim3(unsigned(lines / kImageRows)), dim3(kImageThreads), 0, rows,
                      slot.held.begin * Policy::kTile, slot.memory, const_cast<float*>(image.scales));
        }
        return Layout::from(slot.image(dim), wanted.begin - slot.held.begin);
    }

   public:
    ImageSlots(const Problem& p, TileGroupShape shape, unsigned char* memory, Launches& launches)
        : square_(p.square), whole_(Policy::has_whole_images(p)), launches_(launches) {
        const TileGroupShape tiles = Policy::imaged_tiles(p, shape);
        slots_[0] = {memory, tiles.rows};
        slots_[1] = {memory + tiles.rows * Policy::image_bytes_of_tile(p), tiles.cols};
    }
    ImageSlots(const ImageSlots&) = delete;

    // Sees to it that the group's rows and columns have images.
    void bring(TileGroup<Acc>& group, const Rows<T, Acc>& rows, const Rows<T, Acc>& cols) {
        group.row_image = bring(0, rows, {group.row_tile, group.row_tile + group.row_tiles});
        group.col_image = bring(1, cols, {group.col_tile, group.col_tile + group.col_tiles});
    }
};

}  // namespace dml::cuda
