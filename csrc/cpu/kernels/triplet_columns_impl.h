// Selection among the columns of a row: those in range, the largest, the smallest, and draws.

namespace dml::cpu::DML_ISA {

template <typename T>
int64_t keep_allowed(T* s, int64_t m, const TripletParams<T>& params) {
    int64_t left = 0;
    for (int64_t from = 0; from < m; from += kSweep) {
        const int64_t to = from + kSweep < m ? from + kSweep : m;
        T here = 0;
#pragma omp simd reduction(+ : here)
        for (int64_t j = from; j < to; ++j) {
            const bool allowed = params.negative_allowed(-s[j]);
            s[j] = allowed ? s[j] : std::numeric_limits<T>::quiet_NaN();
            here += allowed ? T(1) : T(0);
        }
        left += static_cast<int64_t>(here);
    }
    return left;
}

template <typename T>
DML_INLINE int64_t first_equal(const T* s, int64_t m, T value) {
    for (int64_t from = 0; from < m; from += kDrawBlock) {
        const int64_t to = from + kDrawBlock < m ? from + kDrawBlock : m;
        int here = 0;
#pragma omp simd reduction(| : here)
        for (int64_t j = from; j < to; ++j) here |= s[j] == value ? 1 : 0;
        if (!here) continue;
        int64_t j = from;
        while (!(s[j] == value)) ++j;
        return j;
    }
    return -1;
}

template <typename T>
int64_t largest(const T* s, int64_t m, T limit) {
    T most = -infinity<T>();
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < m; ++j) {
        const T here = s[j] < limit ? s[j] : -infinity<T>();
        most = here > most ? here : most;
    }
    return most > -infinity<T>() ? first_equal(s, m, most) : -1;
}

template <typename T>
int64_t smallest(const T* s, int64_t m) {
    T least = infinity<T>();
#pragma omp simd reduction(min : least)
    for (int64_t j = 0; j < m; ++j) {
        const T here = s[j] < infinity<T>() ? s[j] : infinity<T>();
        least = here < least ? here : least;
    }
    return least < infinity<T>() ? first_equal(s, m, least) : -1;
}

template <typename T>
void draw_weights(const T* s, int64_t m, const TripletParams<T>& params, T* weights, double* sums) {
    const TripletParams<T> p = params;
    T most = -infinity<T>();
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < m; ++j) {
        weights[j] = draw_log_weight(p, -s[j]);
        most = weights[j] > most ? weights[j] : most;
    }
    for (int64_t from = 0; from < m; from += kDrawBlock) {
        const int64_t to = from + kDrawBlock < m ? from + kDrawBlock : m;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = from; j < to; ++j) {
            const T weight = weights[j] > -infinity<T>() ? exp_fast(weights[j] - most) : T(0);
            weights[j] = weight;
            sum += weight;
        }
        sums[from / kDrawBlock] = static_cast<double>(sum);
    }
}

}  // namespace dml::cpu::DML_ISA
