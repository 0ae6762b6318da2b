// Weight tiles with few non-zeros: their compression, and their product with points.

namespace dml::cpu::DML_ISA {

template <typename T>
void compress(const T* weights, int64_t pitch, int rows, int cols, int64_t count, void* memory) {
    // The layout of SparseTile, for writing.
    T* value = static_cast<T*>(memory);
    auto* start = reinterpret_cast<uint16_t*>(value + 2 * count);
    auto* index = reinterpret_cast<uint8_t*>(start + rows + cols + 2);
    T* col_value = value + count;
    uint16_t* col_start = start + rows + 1;
    uint8_t* col_index = index + count;
    int n = 0;
    for (int i = 0; i < rows; ++i) {
        start[i] = static_cast<uint16_t>(n);
        const T* w = weights + i * pitch;
        for (int64_t j = 0; j < cols; ++j) {  // no branch: always write, advance only past a non-zero
            index[n] = static_cast<uint8_t>(j);
            value[n] = w[j];
            n += w[j] != T(0);
        }
    }
    start[rows] = static_cast<uint16_t>(n);
    int column_count[kMostSide] = {};
    for (int k = 0; k < n; ++k) ++column_count[index[k]];
    int next[kMostSide];
    int total = 0;
    for (int64_t j = 0; j < cols; ++j) {
        col_start[j] = static_cast<uint16_t>(total);
        next[j] = total;
        total += column_count[j];
    }
    col_start[cols] = static_cast<uint16_t>(total);
    for (int i = 0; i < rows; ++i) {
        for (int k = start[i]; k < start[i + 1]; ++k) {
            const int at = next[index[k]]++;
            col_index[at] = static_cast<uint8_t>(i);
            col_value[at] = value[k];
        }
    }
}

// A column slice of kVectors vectors, a line's sums in registers.
template <typename T, int kVectors>
DML_INLINE void add_product_slice(const typename SparseTile<T>::Lines& sparse, int lines, const T* x,
                                  int64_t x_stride, T* out, int64_t out_stride) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T);
    using V = Vector<T>;
    for (int i = 0; i < lines; ++i) {
        const int begin = sparse.start[i], end = sparse.start[i + 1];
        if (begin == end) continue;
        V* line = reinterpret_cast<V*>(out + i * out_stride);
        V sum[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[v] = line[v];
        for (int k = begin; k < end; ++k) {
            const T value = sparse.value[k];
            const T* source = x + sparse.index[k] * x_stride;
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v)
                sum[v] += value * *reinterpret_cast<const V*>(source + v * kLanes);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) line[v] = sum[v];
    }
}

// A column slice at a time, so that its part of x stays in the first-level cache.
template <typename T>
void add_product(const typename SparseTile<T>::Lines& sparse, int lines, const T* x, int64_t x_stride,
                 int64_t dim, T* out, int64_t out_stride) {
    constexpr int kLanes = DML_VECTOR_BYTES / sizeof(T);
    constexpr int kWide = DML_VECTOR_BYTES == 64 ? 4 : 8;
    int64_t at = 0;
    for (; at + kWide * kLanes <= dim; at += kWide * kLanes) {
        add_product_slice<T, kWide>(sparse, lines, x + at, x_stride, out + at, out_stride);
    }
    for (; at + kLanes <= dim; at += kLanes) {
        add_product_slice<T, 1>(sparse, lines, x + at, x_stride, out + at, out_stride);
    }
    if (at == dim) return;
    for (int i = 0; i < lines; ++i) {
        for (int k = sparse.start[i]; k < sparse.start[i + 1]; ++k) {
            const T* source = x + sparse.index[k] * x_stride;
            for (int64_t d = at; d < dim; ++d) out[i * out_stride + d] += sparse.value[k] * source[d];
        }
    }
}

}  // namespace dml::cpu::DML_ISA
