// Packs points whose rows are not whole 16-byte chunks: every other kernel knows aligned rows only.
#pragma once

#include <stdexcept>

#include "cuda/common/launch.h"
#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/rows.cuh"

namespace dml::cuda {

// Bytes of the packed copy; 0 where the points are aligned.
template <typename T>
int64_t packed_bytes(const Points& p, int64_t dim) {
    const uint64_t stride = static_cast<uint64_t>(p.count > 1 ? p.stride : 0);
    const uint64_t bits =
        reinterpret_cast<uintptr_t>(p.data) | (stride | static_cast<uint64_t>(dim)) * sizeof(T);
    const bool aligned = bits % 16 == 0 && stride * sizeof(T) < 1ull << 32;
    return aligned || dim == 0 ? 0 : p.count * packed_stride<T>(dim) * int64_t(sizeof(T));
}
template <typename T>
int64_t packed_bytes(const Problem& p) {
    return packed_bytes<T>(p.queries, p.dim) + (p.square ? 0 : packed_bytes<T>(p.refs, p.dim));
}

// The task with aligned points. Copies lie at the beginning of the workspace, which is advanced past them.
template <typename T>
Task with_aligned_rows(Task task, unsigned char*& workspace, Launches& launches) {
    Problem& p = task.problem;
    if (p.dim * int64_t(sizeof(T)) >= 1ll << 31)
        throw std::invalid_argument("dml_cuda: rows of 2 GiB or more");
    const auto align = [&](Points& points) {
        const int64_t bytes = packed_bytes<T>(points, p.dim), pitch = packed_stride<T>(p.dim);
        if (bytes == 0) return;
        T* packed = reinterpret_cast<T*>(workspace);
        constexpr int kRows = kPackThreads / kWarpSize;
        launches(pack_rows<T>, dim3(unsigned((points.count + kRows - 1) / kRows)), dim3(kPackThreads), 0,
                 static_cast<const T*>(points.data), points.stride, points.count, p.dim, pitch, packed);
        points.data = packed;
        points.stride = pitch;
        workspace += bytes;
    };
    // Copies may read a row's memory even from a side without rows.
    const auto borrow = [](Points& empty, const Points& lender) {
        if (empty.count > 0) return;
        empty.data = lender.data;
        empty.stride = lender.stride;
    };
    align(p.queries);
    if (p.square) {
        p.refs = p.queries;
    } else {
        align(p.refs);
        borrow(p.queries, p.refs);
        borrow(p.refs, p.queries);
    }
    return task;
}

}  // namespace dml::cuda
