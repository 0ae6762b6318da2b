// The bodies of product_kernels.h. Included after tile_kernels_impl.h, whose Vector it uses.

namespace dml::cpu::DML_ISA {

// Steps of the inner dimension summed in registers before they are added to the result. A panel of the right
// factor with so many rows stays in the first-level cache.
inline constexpr int64_t kInner = 128;

// In registers: kRows x kWidth sums, kWidth vectors of the right factor and one number of the left. AVX-512
// and ARM have 32 vector registers, the others 16.
#if DML_VECTOR_BYTES == 64 || defined(__aarch64__)
inline constexpr int kRows = 8, kWidth = 3;
#else
inline constexpr int kRows = 4, kWidth = 3;
#endif

template <typename T>
inline constexpr int64_t kLanes = DML_VECTOR_BYTES / sizeof(T);

// Similarities write the product of the first block of the inner dimension (kWrite) and add the others
// (kAdd). Weights, the left factor of the gradient, lie by rows or transposed by columns.
enum class Product { kWrite, kAdd, kAddByRows, kAddByCols };

// Numbers in a cache line.
template <typename T>
inline constexpr int64_t kLine = 64 / sizeof(T);

// c = a b, or c += a b, for kRows rows and kVectors vectors of columns. It prefetches what the next blocks
// read, as the rows of a factor lie too far apart for the hardware to prefetch: for similarities kRows rows
// of the right factor, for weights their next rows or columns and a cache line of each row of the right
// factor. Prefetches beyond the end are harmless.
template <typename T, int kVectors, Product kWhat>
DML_INLINE void product_block(int64_t inner, const T* a, int64_t a_step, const T* b, int64_t b_step, T* c,
                              int64_t c_step, const T* ahead, int64_t ahead_step) {
    using V = Vector<T>;
    constexpr bool kWeights = kWhat == Product::kAddByRows || kWhat == Product::kAddByCols;
    V sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        __builtin_prefetch(c + i * c_step, 1);
        if constexpr (kVectors > 1) __builtin_prefetch(c + i * c_step + (kVectors * kLanes<T> - 1), 1);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] = V{};
    }
    for (int64_t begin = 0; begin < inner; begin += kLine<T>) {
        const int64_t end = begin + kLine<T> < inner ? begin + kLine<T> : inner;
        if constexpr (kWhat != Product::kAddByCols) {
            const T* from = kWeights ? a + kRows * a_step : ahead;
            const int64_t step = kWeights ? a_step : ahead_step;
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) __builtin_prefetch(from + i * step + begin);
        }
        for (int64_t k = begin; k < end; ++k) {
            V y[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                y[v] = *reinterpret_cast<const V*>(b + k * b_step + v * kLanes<T>);
            if constexpr (kWeights) __builtin_prefetch(ahead + k * ahead_step, 0, 2);
            if constexpr (kWhat == Product::kAddByCols) __builtin_prefetch(a + kLine<T> + k * a_step);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                const T x = kWhat == Product::kAddByCols ? a[i + k * a_step] : a[i * a_step + k];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sum[i][v] += x * y[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            V* out = reinterpret_cast<V*>(c + i * c_step + v * kLanes<T>);
            *out = kWhat == Product::kWrite ? sum[i][v] : *out + sum[i][v];
        }
    }
}

// ahead: the next panel of the right factor; each block prefetches a part of it.
template <typename T, int kVectors, Product kWhat>
void product_panel(int64_t rows, int64_t inner, const T* a, int64_t a_step, const T* b, int64_t b_step, T* c,
                   int64_t c_step, const T* ahead, int64_t ahead_step) {
    constexpr bool kWeights = kWhat == Product::kAddByRows || kWhat == Product::kAddByCols;
    constexpr int64_t kPanel = kWidth * kLanes<T>;
    const int64_t share = (kPanel * kRows + rows - 1) / rows;  // rows of the next panel for each block
    for (int64_t i = 0; i < rows; i += kRows) {
        const int64_t block = i / kRows;
        const T* next = kWeights ? ahead + block % kWidth * kLanes<T> : ahead + block * share * ahead_step;
        product_block<T, kVectors, kWhat>(inner, kWhat == Product::kAddByCols ? a + i : a + i * a_step,
                                          a_step, b, b_step, c + i * c_step, c_step, next, ahead_step);
    }
}

// The function for a panel of at most kWidth vectors of columns.
template <typename T, Product kWhat>
DML_INLINE auto panel_of(int64_t vectors) {
    return vectors == 3   ? product_panel<T, 3, kWhat>
           : vectors == 2 ? product_panel<T, 2, kWhat>
                          : product_panel<T, 1, kWhat>;
}

// [kLanes, kLanes] numbers, transposed; both strided.
template <typename T>
DML_INLINE void transpose_square(const T* from, int64_t from_step, T* to, int64_t to_step) {
    constexpr int kSide = kLanes<T>;
    using V = Vector<T>;
    V line[kSide];
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) line[i] = *reinterpret_cast<const V*>(from + i * from_step);
#if defined(__clang__)
    for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) to[j * to_step + i] = line[i][j];
#else
    using Index __attribute__((vector_size(DML_VECTOR_BYTES))) =
        std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    // Swaps the off-diagonal blocks of 1 x 1, 2 x 2, ...
#pragma GCC unroll 4
    for (int step = 1; step < kSide; step *= 2) {
        Index low, high;
#pragma GCC unroll 16
        for (int e = 0; e < kSide; ++e) {
            low[e] = e & step ? kSide + e - step : e;
            high[e] = e & step ? kSide + e : e + step;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) {
            if (i & step) continue;
            const V a = line[i], b = line[i + step];
            line[i] = __builtin_shuffle(a, b, low);
            line[i + step] = __builtin_shuffle(a, b, high);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) *reinterpret_cast<V*>(to + i * to_step) = line[i];
#endif
}

// to[k * to_step + j] = y[j * y_stride + k] for k below inner and the vectors' columns j.
template <typename T>
void transpose_panel(int64_t vectors, int64_t inner, const T* y, int64_t y_stride, T* to, int64_t to_step) {
    constexpr int64_t kSide = kLanes<T>;
    for (int64_t v = 0; v < vectors; ++v) {
        const T* from = y + v * kSide * y_stride;
        int64_t k = 0;
        for (; k + kSide <= inner; k += kSide)
            transpose_square(from + k, y_stride, to + k * to_step + v * kSide, to_step);
        for (; k < inner; ++k)
            for (int64_t j = 0; j < kSide; ++j) to[k * to_step + v * kSide + j] = from[j * y_stride + k];
    }
}

template <typename T>
void similarities(int64_t rows, int64_t cols, int64_t dim, const T* x, int64_t x_stride, const T* y,
                  int64_t y_stride, T* s, int64_t pitch) {
    constexpr int64_t kPanel = kWidth * kLanes<T>;
    alignas(64) T panel[kInner * kPanel];
    const int64_t vectors = cols / kLanes<T>;
    for (int64_t v = 0; v < vectors; v += kWidth) {
        const int64_t wide = vectors - v < kWidth ? vectors - v : kWidth, j = v * kLanes<T>;
        for (int64_t k = 0; k == 0 || k < dim; k += kInner) {
            const int64_t inner = dim - k < kInner ? dim - k : kInner;
            transpose_panel(wide, inner, y + j * y_stride + k, y_stride, panel, kPanel);
            const auto run = k == 0 ? panel_of<T, Product::kWrite>(wide) : panel_of<T, Product::kAdd>(wide);
            const bool more = k + kInner < dim;  // next: the same columns, else the next ones
            const T* ahead = more ? y + j * y_stride + k + kInner : y + (j + wide * kLanes<T>)*y_stride;
            run(rows, inner, x + k, x_stride, panel, kPanel, s + j, pitch, ahead, y_stride);
        }
    }
}

template <typename T>
void add_weighted(int64_t lines, int64_t dims, int64_t inner, const Strided<T>& w, const T* x,
                  int64_t x_stride, T* out, int64_t out_stride) {
    const int64_t vectors = dims / kLanes<T>, step = w.col == 1 ? w.row : w.col;
    for (int64_t k = 0; k < inner; k += kInner) {
        const int64_t here = inner - k < kInner ? inner - k : kInner;
        for (int64_t v = 0; v < vectors; v += kWidth) {
            const int64_t wide = vectors - v < kWidth ? vectors - v : kWidth, d = v * kLanes<T>;
            const auto run =
                w.col == 1 ? panel_of<T, Product::kAddByRows>(wide) : panel_of<T, Product::kAddByCols>(wide);
            const bool more = v + kWidth < vectors;  // next: the same rows, else the next ones
            const T* ahead = more ? x + k * x_stride + d + wide * kLanes<T> : x + (k + here) * x_stride;
            run(lines, here, w.data + k * w.col, step, x + k * x_stride + d, x_stride, out + d, out_stride,
                ahead, x_stride);
        }
    }
}

// Rows of `to` are written whole. It prefetches the rows to come, as those of a large matrix lie too far apart
// for the hardware to prefetch them; prefetches beyond the end are harmless.
template <typename T>
void transpose(int64_t rows, int64_t cols, const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    constexpr int64_t kSide = kLanes<T>;
    const int64_t whole_rows = rows / kSide * kSide, whole_cols = cols / kSide * kSide;
    for (int64_t j = 0; j < whole_cols; j += kSide) {
        for (int64_t i = 0; i < whole_rows; i += kSide) {
            const bool more = i + kSide < whole_rows;  // next: these columns, else the next ones
            const T* ahead = more ? from + (i + kSide) * from_stride + j : from + j + kSide;
#pragma GCC unroll 16
            for (int64_t k = 0; k < kSide; ++k) __builtin_prefetch(ahead + k * from_stride);
            transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j)
            to[j * to_stride + i] = from[i * from_stride + j];
    }
}

template <typename T>
double square(int64_t n, const T* x) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; ++d) sum += double(x[d]) * double(x[d]);
    return sum;
}

template <typename T>
void scale(int64_t n, T factor, T* x) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) x[d] *= factor;
}

template <typename T>
T row_dot(int64_t n, const T* x, const T* y) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; ++d) sum += x[d] * y[d];
    return sum;
}

template <typename T>
void across(int64_t n, const T* g, T along, const T* x, T factor, T* out) {
#pragma omp simd
    for (int64_t d = 0; d < n; ++d) out[d] = (g[d] - along * x[d]) * factor;
}

template <typename T>
const ProductKernels<T>& tile_products() {
    static const ProductKernels<T> table = {similarities<T>, add_weighted<T>, transpose<T>, square<T>,
                                            scale<T>,        row_dot<T>,      across<T>};
    return table;
}

template const ProductKernels<float>& tile_products<float>();
template const ProductKernels<double>& tile_products<double>();

}  // namespace dml::cpu::DML_ISA
