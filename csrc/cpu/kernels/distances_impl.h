// Distances from inner products.

namespace dml::cpu::DML_ISA {

// |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y> cancels for close points. Below this share of |x|^2 + |y|^2 the
// difference is summed directly.
template <typename T>
inline constexpr T kNearShare = T(1) / T(64);

// s: [rows, cols] inner products in, negated distances out.
template <typename T>
void distances(T* s, int64_t pitch, int rows, int cols, const T* x, int64_t x_stride, const T* x_square,
               const T* y, int64_t y_stride, const T* y_square, int64_t dim) {
    for (int i = 0; i < rows; ++i) {
        T* line = s + i * pitch;
        const T row_square = x_square[i];
        int near = 0;
#pragma omp simd reduction(+ : near)
        for (int64_t j = 0; j < cols; ++j) {
            const T both = row_square + y_square[j], square = both - T(2) * line[j];
            near += square < kNearShare<T> * both ? 1 : 0;
            line[j] = square;
        }
        if (near > 0) {
            for (int64_t j = 0; j < cols; ++j) {
                if (!(line[j] < kNearShare<T> * (row_square + y_square[j]))) continue;
                const T *a = x + i * x_stride, *b = y + j * y_stride;
                T square = 0;
#pragma omp simd reduction(+ : square)
                for (int64_t d = 0; d < dim; ++d) square += (a[d] - b[d]) * (a[d] - b[d]);
                line[j] = square;
            }
        }
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) line[j] = -std::sqrt(line[j] > T(0) ? line[j] : T(0));
    }
}

}  // namespace dml::cpu::DML_ISA
