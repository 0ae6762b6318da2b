// Backward: the derivatives of a tile's terms by the similarities and by the parameters of a formula.

namespace dml::cpu::DML_ISA {

// No parameter learns.
struct NoParamSums {
    static constexpr bool kLearns = false;
};

// What the terms of a row's pairs see: the same number, or each column's.
template <typename T>
struct SameContext {
    T value;
    DML_INLINE T operator()(int64_t) const { return value; }
};
template <typename T>
struct ColumnContext {
    const T* values;
    DML_INLINE T operator()(int64_t j) const { return values[j]; }
};

// Sums over pairs of coefficient * d term / d parameter, where the coefficient is dL/dterm.
template <typename T, typename Formula>
class ParamSums {
   public:
    static constexpr bool kLearns = true;

    DML_INLINE ParamSums(const double* params, double* sums) : derivatives_(params), sums_(sums) {}

    // The pairs [begin, end) of a row: their sums, and their weights, coefficient * d term / d similarity, in
    // `out`. context(j): what the terms of pair j see. Not inlined: weights of both accumulators, of one side and of
    // both share it.
    template <bool kAdd, typename Kind, typename Context>
    __attribute__((noinline)) void add(const Kind& kind, const T* s, const T* coefficient, int64_t begin,
                                       int64_t end, T* out, const Context& context) const {
        const TermDerivatives<T, Formula> derivatives = derivatives_;
        alignas(64) T by_params[kCount == 0 ? 1 : kCount][kMostSide];
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) {
            const T weight =
                put(kind.derivatives(derivatives, s[j], context(j)), coefficient[j], &by_params[0][j]);
            out[j] = kAdd ? out[j] + weight : weight;
        }
        for (int k = 0; k < kCount; ++k) {
            T sum = T(0);
#pragma omp simd reduction(+ : sum)
            for (int64_t j = begin; j < end; ++j) sum += by_params[k][j];
            sums_[k] += double(sum);
        }
    }

   private:
    static constexpr int kCount = Formula::kParamCount;

    // Writes coefficient * derivative for each parameter; returns that of the similarity. A function, as compilers
    // do not vectorise loops that declare such a struct.
    static DML_INLINE T put(typename TermDerivatives<T, Formula>::All derivatives, T coefficient,
                            T* by_params) {
        const auto of_pair = where(coefficient != T(0), coefficient * derivatives);  // no 0 * inf
        put_rest(of_pair.rest, by_params);
        return of_pair.first;
    }
    template <int N>
    static DML_INLINE void put_rest(Lanes<T, N> lanes, T* at) {
        if constexpr (N > 0) {
            *at = lanes.first;
            put_rest(lanes.rest, at + kMostSide);
        }
    }

    const TermDerivatives<T, Formula> derivatives_;
    double* const sums_;  // [kCount]
};

}  // namespace dml::cpu::DML_ISA
