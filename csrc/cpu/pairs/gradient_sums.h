// The gradient of one side's packed points: summed for the points of a window, then written as the gradient
// of the embeddings.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "cpu/pairs/points.h"
#include "cpu/tasks.h"

namespace dml::cpu {

template <typename T>
class GradientSums {
   public:
    // out: [N, D] the gradient of the embeddings, undefined where it is not wanted. It may have columns
    // where the points are columns.
    GradientSums(PackedPoints<T>& points, const at::Tensor& out) : points_(points), out_(out) {}

    bool wanted() const { return out_.defined(); }
    T* row(int64_t i) const { return sum_.data() + (i - first_) * points_.padded_width(); }

    // Starts the sums of the points [first, last) at 0, unless they are open already.
    void open(int64_t first, int64_t last) {
        if (!wanted() || (open_ && first == first_)) return;
        const int64_t width = points_.padded_width();
        sum_.reserve(padded(last - first) * width);
        first_ = first;
        open_ = true;
        for_pieces(last - first, row_piece(width), (last - first) * row_work(width) / 4,
                   [&](int64_t from, int64_t to) { std::fill(row(first + from), row(first + to), T(0)); });
    }

    // Writes them to `out`: 0 for points that were never opened.
    void close(int64_t first, int64_t last) {
        if (!wanted()) return;
        if (open_) {
            points_.show(first, last);  // the normalisation's backward reads the points
            unpack(static_cast<const T*>(row(first)), points_, first, last - first, out_);
        } else {
            clear_rows(points_, first, last - first, out_);
        }
        open_ = false;
    }

   private:
    PackedPoints<T>& points_;
    const at::Tensor out_;
    Numbers<T> sum_;  // [padded(window), padded width]
    int64_t first_ = 0;
    bool open_ = false;
};

}  // namespace dml::cpu
