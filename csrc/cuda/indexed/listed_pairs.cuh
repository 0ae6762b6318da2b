// Pairs given as lists of indices. The kernels gather and are bound by memory: a warp computes a pair, a
// segment of logits, or a segment's sum over a slice of the dimensions, and adds in a fixed order.
#pragma once

#include "cuda/indexed/listed_pairs.h"
#include "cuda/pairs/rows.cuh"

namespace dml::cuda {

inline constexpr int kPairThreads = 256;

// Calls f(item) for each of this warp's items, of which there may be more than warps.
template <typename F>
DML_DEVICE void for_each_of_warp(int64_t items, const F& f) {
    constexpr int kWarps = kPairThreads / kWarpSize;
    for (int64_t item = int64_t(blockIdx.x) * kWarps + warp_id(); item < items;
         item += int64_t(gridDim.x) * kWarps) {
        f(item);
    }
}

// 16 bytes of a row of points, which a lane reads at once.
template <typename T>
struct alignas(16) Chunk {
    static constexpr int kCount = 16 / int(sizeof(T));
    T value[kCount];

    // row[d..] of a row of dim elements; 0 past its end. Whole: dim is a multiple of kCount, and 16 bytes may
    // be read at once.
    template <bool Whole>
    static DML_DEVICE Chunk load(const T* row, int64_t d, int64_t dim) {
        if constexpr (Whole) {
            return *reinterpret_cast<const Chunk*>(row + d);
        } else {
            Chunk x;
#pragma unroll
            for (int e = 0; e < kCount; ++e) x.value[e] = d + e < dim ? row[d + e] : T(0);
            return x;
        }
    }
    template <bool Whole>
    DML_DEVICE void store(T* row, int64_t d, int64_t dim) const {
        if constexpr (Whole) {
            *reinterpret_cast<Chunk*>(row + d) = *this;
        } else {
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
                if (d + e < dim) row[d + e] = value[e];
            }
        }
    }
};

// The dimensions that one warp reads at once.
template <typename T>
inline constexpr int kWarpSlice = kWarpSize * Chunk<T>::kCount;

DML_DEVICE bool in_range(int64_t index, int64_t count) { return index >= 0 && index < count; }

template <typename T, bool Whole>
__global__ void __launch_bounds__(kPairThreads)
    pair_products(PointList<T> x, PointList<T> y, const int64_t* rows, const int64_t* cols, int64_t pairs,
                  T* out) {
    using Elements = Chunk<T>;
    for_each_of_warp(pairs, [&](int64_t k) {
        const int64_t i = rows[k], j = cols[k];
        T sum = 0;
        if (!in_range(i, x.count) || !in_range(j, y.count)) {
            sum = not_a_number<T>();
        } else {
            for (int64_t d = lane_id() * Elements::kCount; d < x.dim; d += kWarpSlice<T>) {
                const Elements a = Elements::template load<Whole>(x.data + i * x.dim, d, x.dim);
                const Elements b = Elements::template load<Whole>(y.data + j * y.dim, d, y.dim);
#pragma unroll
                for (int e = 0; e < Elements::kCount; ++e) sum = std::fma(a.value[e], b.value[e], sum);
            }
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) out[k] = sum;
    });
}

// One segment; if it does not lie in [0, length) it is empty and not valid.
struct Segment {
    int64_t begin, end;
    bool valid;

    static DML_DEVICE Segment load(const Segments& segments, int64_t r) {
        const int64_t begin = segments.offsets[r], end = segments.offsets[r + 1];
        const bool valid = begin >= 0 && begin <= end && end <= segments.length;
        return {valid ? begin : 0, valid ? end : 0, valid};
    }
};

template <typename T, bool Whole>
__global__ void __launch_bounds__(kPairThreads)
    pair_sums(const T* weights, PointList<T> points, const int64_t* index, Segments segments, T* out) {
    using Elements = Chunk<T>;
    const int64_t dim = points.dim, slices = (dim + kWarpSlice<T> - 1) / kWarpSlice<T>;
    for_each_of_warp(segments.count * slices, [&](int64_t item) {
        const int64_t r = item / slices, d = item % slices * kWarpSlice<T> + lane_id() * Elements::kCount;
        if (d >= dim) return;
        const Segment segment = Segment::load(segments, r);
        Elements sum;
        for (T& value : sum.value) value = segment.valid ? T(0) : not_a_number<T>();
#pragma unroll 4
        for (int64_t k = segment.begin; k < segment.end; ++k) {
            const int64_t i = index[k];
            const bool good = in_range(i, points.count);
            const T weight = good ? weights[k] : not_a_number<T>();
            const Elements point =
                good ? Elements::template load<Whole>(points.data + i * dim, d, dim) : Elements{};
#pragma unroll
            for (int e = 0; e < Elements::kCount; ++e)
                sum.value[e] = std::fma(weight, point.value[e], sum.value[e]);
        }
        sum.template store<Whole>(out + r * dim, d, dim);
    });
}

// The sum is a double: a segment may be long, and the sum near 0 where the logarithm is taken.
template <typename T>
__global__ void __launch_bounds__(kPairThreads)
    segment_logsumexp(const T* logits, Segments segments, bool plus_one, T* out) {
    for_each_of_warp(segments.count, [&](int64_t r) {
        const Segment segment = Segment::load(segments, r);
        T largest = plus_one ? T(0) : -infinity<T>();
        for (int64_t k = segment.begin + lane_id(); k < segment.end; k += kWarpSize)
            largest = logits[k] > largest ? logits[k] : largest;
        largest = warp_max(largest);
        const T shift = is_finite(largest) ? largest : T(0);
        double sum = 0;
        for (int64_t k = segment.begin + lane_id(); k < segment.end; k += kWarpSize)
            sum += double(std::exp(logits[k] - shift));
        sum = warp_sum(sum);
        if (lane_id() != 0) return;
        if (!segment.valid) {
            out[r] = not_a_number<T>();
        } else if (plus_one && shift == T(0)) {  // accurate for tiny sums, too
            out[r] = T(std::log1p(sum));
        } else {
            out[r] = T(double(shift) + std::log(sum + (plus_one ? std::exp(-double(shift)) : 0.0)));
        }
    });
}

template <typename T>
__global__ void __launch_bounds__(kPairThreads)
    segment_softmax(const T* grad, const T* logits, const T* value, Segments segments, T* out) {
    for_each_of_warp(segments.count, [&](int64_t r) {
        const Segment segment = Segment::load(segments, r);
        const T scale = grad[r];
        const T shift = value[r] == -infinity<T>() ? T(0) : value[r];  // all logits are -inf: 0, not NaN
        for (int64_t k = segment.begin + lane_id(); k < segment.end; k += kWarpSize)
            out[k] = scale * std::exp(logits[k] - shift);
    });
}

}  // namespace dml::cuda
