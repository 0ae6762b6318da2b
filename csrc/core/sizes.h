// Arithmetic on sizes, for layouts of memory. An Int is int64_t or torch's symbolic integer, which must not
// be compared: torch.compile would compile one graph for each outcome. So nothing here branches on a size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace dml {

template <typename Int>
Int size_min(const Int& a, const Int& b) {
    if constexpr (std::is_same_v<Int, int64_t>) {
        return std::min(a, b);
    } else {
        return a.min(b);
    }
}
template <typename Int>
Int size_max(const Int& a, const Int& b) {
    if constexpr (std::is_same_v<Int, int64_t>) {
        return std::max(a, b);
    } else {
        return a.max(b);
    }
}

// 1 where x > 0, else 0.
template <typename Int>
Int is_positive(const Int& x) {
    return size_min(Int(1), size_max(x, Int(0)));
}

template <typename Int>
Int ceil_div(const Int& x, int64_t by) {
    return (x + Int(by - 1)) / Int(by);
}
template <typename Int>
Int round_up(const Int& x, int64_t to) {
    return ceil_div(x, to) * Int(to);
}

// Tiles of a matrix with so many tiles down and across; of a square only those on and above the diagonal.
template <typename Int>
Int tile_count(const Int& down, const Int& across, bool square) {
    return square ? down * (down + Int(1)) / Int(2) : down * across;
}

}  // namespace dml
