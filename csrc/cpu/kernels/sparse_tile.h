// A weight tile with few non-zeros, as backward multiplies it.
#pragma once

#include <cstdint>

namespace dml::cpu {

// The non-zeros of a weight tile, by row and by column, in the memory of the tile itself.
template <typename T>
struct SparseTile {
    struct Lines {
        const uint16_t* start;  // [lines + 1]
        const T* value;
        const uint8_t* index;  // position across the line
    };
    Lines by_row, by_col;

    static constexpr int64_t bytes(int rows, int cols, int64_t count) {
        const int64_t starts = (rows + cols + 2) * int64_t(sizeof(uint16_t));
        return 2 * count * int64_t(sizeof(T) + 1) + starts;
    }
    // memory: [values by row | values by column | starts | starts | index | index]
    SparseTile(void* memory, int rows, int cols, int64_t count) {
        auto* value = static_cast<T*>(memory);
        auto* start = reinterpret_cast<uint16_t*>(value + 2 * count);
        auto* index = reinterpret_cast<uint8_t*>(start + rows + cols + 2);
        by_row = {start, value, index};
        by_col = {start + rows + 1, value + count, index + count};
    }
};

}  // namespace dml::cpu
