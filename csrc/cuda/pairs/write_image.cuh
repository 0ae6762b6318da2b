// Writes the image of points that tile products read (common/images.cuh).
#pragma once

#include "cuda/common/images.cuh"
#include "cuda/common/math.cuh"
#include "cuda/pairs/tile_group.cuh"

namespace dml::cuda {

// Points of each arithmetic in images: the type of their parts, how many, and whether rows are scaled by a power of two.
template <typename Math>
struct PartsOf {
    using Type = typename Math::Value;
    static constexpr int kCount = 1;
    static constexpr bool kScaled = false;
};
template <int Parts>
struct PartsOf<ScaledMath<Parts>> {
    using Type = __half;
    static constexpr int kCount = Parts;
    static constexpr bool kScaled = true;
};

template <typename Math>
using PointsLayout =
    ImageLayout<typename PartsOf<Math>::Type, kTileSide<typename Math::Acc>, PartsOf<Math>::kCount>;

inline constexpr int kImageThreads = 256;
inline constexpr int kImageRows = kImageThreads / kWarpSize;  // of a thread block: a warp a row

// The image of the tiles from row `first` on, of rows that may begin anywhere; rows that are not in use are 0 there.
// scales: of its rows, where they are scaled. A launch of a warp for each row of these tiles.
template <typename Math, typename T = typename Math::Value, typename Acc = typename Math::Acc>
__global__ void __launch_bounds__(kImageThreads)
    write_image(const __grid_constant__ Rows<T, Acc> all, int64_t first, unsigned char* blocks,
                float* scales) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    using Layout = PointsLayout<Math>;
    constexpr int kElements = kChunkBytes / int(sizeof(typename Layout::Element));
    const Matrix<T> points = all.in_use().points;
    const int64_t line = int64_t(blockIdx.x) * kImageRows + warp_id(), i = first + line;
    const T* const row = points.data + i * points.stride;
    const int64_t cols = i < points.rows ? points.cols : 0;
    const int64_t chunks = Layout::across(points.cols) * (kSwizzleBytes / kChunkBytes);
    const bool is_aligned = begin_on_chunks(points);

    const auto load = [&](int64_t chunk, T(&x)[kElements]) {
        const int64_t d = chunk * kElements;
        if (is_aligned && d + kElements <= cols) {
            constexpr int kVectors = kElements * int(sizeof(T)) / 16, kEach = kElements / kVectors;
            const auto* vectors = reinterpret_cast<const Vector<T, kEach>*>(row + d);
#pragma unroll
            for (int e = 0; e < kElements; ++e) x[e] = vectors[e / kEach].value[e % kEach];
        } else {
#pragma unroll
            for (int e = 0; e < kElements; ++e) x[e] = d + e < cols ? row[d + e] : T(0.0f);
        }
    };
    float up = 1.0f;
    if constexpr (PartsOf<Math>::kScaled) {
        float largest = 0.0f;
#pragma unroll 2
        for (int64_t chunk = lane_id(); chunk < chunks; chunk += kWarpSize) {
            T x[kElements];
            load(chunk, x);
#pragma unroll
            for (int e = 0; e < kElements; ++e) largest = std::fmax(largest, std::fabs(x[e]));
        }
        up = scale_up(warp_max(largest));
        if (lane_id() == 0) scales[line] = reciprocal_of_power(up);
    }
    unsigned char* const tile = blocks + line / Layout::kRows * Layout::tile_bytes(points.cols);
#pragma unroll 2
    for (int64_t chunk = lane_id(); chunk < chunks; chunk += kWarpSize) {
        alignas(16) T x[kElements];
        load(chunk, x);
        constexpr int kChunks = kSwizzleBytes / kChunkBytes;
        if constexpr (PartsOf<Math>::kScaled) {
#pragma unroll
            for (T& element : x) element *= up;
        }
        write_chunk<Layout>(x, tile + chunk / kChunks * Layout::kBlockBytes +
                                   swizzled_chunk(int(line % Layout::kRows), int(chunk % kChunks)));
    }
}

}  // namespace dml::cuda
