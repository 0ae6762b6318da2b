// Loops over blocks of a matrix of similarities or weights.

namespace dml::cpu::DML_ISA {

constexpr int64_t kSmall = 16;  // a square of them fits in the first-level cache twice

template <typename T>
void transpose(const T* a, T* b, int64_t pitch, int64_t rows, int64_t cols) {
    for (int64_t i0 = 0; i0 < rows; i0 += kSmall) {
        for (int64_t j0 = 0; j0 < cols; j0 += kSmall) {
            const int64_t i1 = i0 + kSmall < rows ? i0 + kSmall : rows;
            const int64_t j1 = j0 + kSmall < cols ? j0 + kSmall : cols;
            for (int64_t j = j0; j < j1; ++j) {
                for (int64_t i = i0; i < i1; ++i) b[j * pitch + i] = a[i * pitch + j];
            }
        }
    }
}

template <typename T>
void add_transposed(T* a, T* b, int64_t pitch, int64_t rows, int64_t cols) {
    alignas(64) T turned[kSmall * kSmall];
    for (int64_t i0 = 0; i0 < rows; i0 += kSmall) {
        for (int64_t j0 = a == b ? i0 : 0; j0 < cols; j0 += kSmall) {
            const int64_t i1 = i0 + kSmall < rows ? i0 + kSmall : rows;
            const int64_t j1 = j0 + kSmall < cols ? j0 + kSmall : cols;
            for (int64_t j = j0; j < j1; ++j) {
                for (int64_t i = i0; i < i1; ++i) turned[(i - i0) * kSmall + j - j0] = b[j * pitch + i];
            }
            for (int64_t i = i0; i < i1; ++i) {
                for (int64_t j = j0; j < j1; ++j) turned[(i - i0) * kSmall + j - j0] += a[i * pitch + j];
            }
            for (int64_t i = i0; i < i1; ++i) {
                for (int64_t j = j0; j < j1; ++j) a[i * pitch + j] = turned[(i - i0) * kSmall + j - j0];
            }
            for (int64_t j = j0; j < j1; ++j) {
                for (int64_t i = i0; i < i1; ++i) b[j * pitch + i] = turned[(i - i0) * kSmall + j - j0];
            }
        }
    }
}

template <typename T>
int64_t find_nonzeros(const T* w, int64_t pitch, int64_t rows, int64_t cols, uint64_t* bits) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t from = 0; from < cols; from += 64) {
            const T* line = w + i * pitch + from;
            const int64_t here = cols - from < 64 ? cols - from : 64;
            uint64_t word = 0;
#pragma omp simd reduction(| : word)
            for (int64_t j = 0; j < here; ++j) word |= uint64_t(line[j] != T(0)) << j;
            *bits++ = word;
            count += __builtin_popcountll(word);
        }
    }
    return count;
}

template <typename T, int kVectors>
DML_INLINE void add_nonzeros_slice(const T* w, int64_t pitch, int64_t rows, int64_t words,
                                   const uint64_t* bits, const T* points, int64_t stride, T* out,
                                   int64_t out_stride) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T);
    using V = Vector<T>;
    for (int64_t i = 0; i < rows; ++i, bits += words) {
        uint64_t any = 0;
        for (int64_t k = 0; k < words; ++k) any |= bits[k];
        if (any == 0) continue;
        V* line = reinterpret_cast<V*>(out + i * out_stride);
        V sum[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[v] = line[v];
        for (int64_t k = 0; k < words; ++k) {
            for (uint64_t left = bits[k]; left; left &= left - 1) {
                const int64_t j = 64 * k + __builtin_ctzll(left);
                const T weight = w[i * pitch + j];
                const T* source = points + j * stride;
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v)
                    sum[v] += weight * *reinterpret_cast<const V*>(source + v * kLanes);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) line[v] = sum[v];
    }
}

// A column slice at a time, so that its part of the points stays in the first-level cache. dim is a multiple
// of 16, hence of the lanes.
template <typename T>
void add_nonzeros(const T* w, int64_t pitch, int64_t rows, int64_t cols, const uint64_t* bits,
                  const T* points, int64_t stride, int64_t dim, T* out, int64_t out_stride) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T), kWide = DML_VECTOR_BYTES == 64 ? 4 : 8;
    const int64_t words = (cols + 63) / 64;
    int64_t d = 0;
    for (; d + kWide * kLanes <= dim; d += kWide * kLanes) {
        add_nonzeros_slice<T, kWide>(w, pitch, rows, words, bits, points + d, stride, out + d, out_stride);
    }
    for (; d < dim; d += kLanes)
        add_nonzeros_slice<T, 1>(w, pitch, rows, words, bits, points + d, stride, out + d, out_stride);
}

template <typename T, int kVectors>
DML_INLINE void add_points_slice(const T* weights, const int32_t* index, int64_t count, const T* points,
                                 int64_t stride, T* out) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T);
    using V = Vector<T>;
    V* line = reinterpret_cast<V*>(out);
    V sum[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] = line[v];
    for (int64_t k = 0; k < count; ++k) {
        const T* source = points + index[k] * stride;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            sum[v] += weights[k] * *reinterpret_cast<const V*>(source + v * kLanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) line[v] = sum[v];
}

// dim is a multiple of 16, hence of the lanes.
template <typename T>
void add_points(const T* weights, const int32_t* index, int64_t count, const T* points, int64_t stride,
                int64_t dim, T* out) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T), kWide = 8;
    int64_t d = 0;
    for (; d + kWide * kLanes <= dim; d += kWide * kLanes)
        add_points_slice<T, kWide>(weights, index, count, points + d, stride, out + d);
    for (; d < dim; d += kLanes) add_points_slice<T, 1>(weights, index, count, points + d, stride, out + d);
}

}  // namespace dml::cpu::DML_ISA
