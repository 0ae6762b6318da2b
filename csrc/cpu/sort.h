// A parallel radix sort of integers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/tasks.h"

namespace dml::cpu {

inline constexpr int kDigitBits = 11;
// Keys per task, and the most tasks, which bounds the serial part.
inline constexpr int64_t kLeastPiece = 1 << 14, kMostPieces = 64;

// The bits of numbers below `size`.
inline int bits_of(int64_t size) {
    int bits = 0;
    while (bits < 62 && (int64_t(1) << bits) < size) ++bits;
    return bits;
}

// Sorts keys by their bits [from, to), stably, in passes over digits.
inline void sort_keys(std::vector<uint64_t>& keys, int from, int to) {
    using Counts = std::array<int64_t, 1 << kDigitBits>;
    const int64_t count = static_cast<int64_t>(keys.size());
    const int64_t piece = std::max(kLeastPiece, (count + kMostPieces - 1) / kMostPieces);
    std::vector<Counts> places((count + piece - 1) / piece);
    std::vector<uint64_t> moved(keys.size());
    for (int shift = from; shift < to; shift += kDigitBits) {
        const uint64_t mask = (uint64_t(1) << std::min(kDigitBits, to - shift)) - 1;
        const auto digit = [=](uint64_t key) { return (key >> shift) & mask; };
        for_pieces(count, piece, count, [&](int64_t begin, int64_t end) {
            Counts& mine = places[begin / piece];
            mine.fill(0);
            for (int64_t k = begin; k < end; ++k) ++mine[digit(keys[k])];
        });
        int64_t place = 0;  // of a digit's first key in a piece
        for (uint64_t d = 0; d <= mask; ++d) {
            for (Counts& counts : places) place += std::exchange(counts[d], place);
        }
        for_pieces(count, piece, 4 * count, [&](int64_t begin, int64_t end) {
            Counts& mine = places[begin / piece];
            for (int64_t k = begin; k < end; ++k) moved[mine[digit(keys[k])]++] = keys[k];
        });
        keys.swap(moved);
    }
}

}  // namespace dml::cpu
