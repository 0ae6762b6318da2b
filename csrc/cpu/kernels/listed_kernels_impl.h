// The bodies of listed_kernels.h. Included after tile_kernels_impl.h, whose Vector it uses.

namespace dml::cpu::DML_ISA {

template <typename T>
DML_INLINE T dot(const T* a, const T* b, int64_t dim) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T), kSums = 4;  // sums enough to hide the latency
    using V = Vector<T>;
    V sum[kSums] = {};
    int64_t d = 0;
    for (; d + kSums * kLanes <= dim; d += kSums * kLanes) {
#pragma GCC unroll 4
        for (int v = 0; v < kSums; ++v) {
            sum[v] += *reinterpret_cast<const V*>(a + d + v * kLanes) *
                      *reinterpret_cast<const V*>(b + d + v * kLanes);
        }
    }
    for (; d + kLanes <= dim; d += kLanes) {
        sum[0] += *reinterpret_cast<const V*>(a + d) * *reinterpret_cast<const V*>(b + d);
    }
    const V lanes = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    T total = T(0);
    for (; d < dim; ++d) total += a[d] * b[d];
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    return total;
}

template <typename T>
void products(const T* x, const T* y, const int64_t* rows, const int64_t* cols, int64_t from, int64_t to,
              int64_t dim, T* out) {
    for (int64_t k = from; k < to; ++k) out[k] = dot(x + rows[k] * dim, y + cols[k] * dim, dim);
}

// A column slice of a row of the output, summed in registers over the row's pairs.
template <typename T, int kVectors>
DML_INLINE void sum_slice(const T* weights, const T* points, const int64_t* index, int64_t begin, int64_t end,
                          int64_t dim, T* out) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T);
    using V = Vector<T>;
    V sum[kVectors] = {};
    for (int64_t k = begin; k < end; ++k) {
        const T* source = points + index[k] * dim;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            sum[v] += weights[k] * *reinterpret_cast<const V*>(source + v * kLanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(out + v * kLanes) = sum[v];
}

template <typename T>
void sums(const T* weights, const T* points, const int64_t* index, const int64_t* offsets, int64_t from,
          int64_t to, int64_t dim, T* out) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T), kWide = 8;
    for (int64_t r = from; r < to; ++r) {
        const int64_t begin = offsets[r], end = offsets[r + 1];
        T* row = out + r * dim;
        int64_t d = 0;
        for (; d + kWide * kLanes <= dim; d += kWide * kLanes)
            sum_slice<T, kWide>(weights, points + d, index, begin, end, dim, row + d);
        for (; d + kLanes <= dim; d += kLanes)
            sum_slice<T, 1>(weights, points + d, index, begin, end, dim, row + d);
        for (; d < dim; ++d) {
            T sum = T(0);
            for (int64_t k = begin; k < end; ++k) sum += weights[k] * points[index[k] * dim + d];
            row[d] = sum;
        }
    }
}

template <typename T>
const ListedKernels<T>& listed() {
    static const ListedKernels<T> table = {products<T>, sums<T>};
    return table;
}

template const ListedKernels<float>& listed<float>();
template const ListedKernels<double>& listed<double>();

}  // namespace dml::cpu::DML_ISA
