// Backward: the derivatives of a tile's terms by the parameters of a formula.

namespace dml::cpu::DML_ISA {

// No parameter learns.
struct NoParamSums {
    static constexpr bool kLearns = false;
};

// Sums over pairs of coefficient * d term / d parameter, where the coefficient is dL/dterm.
template <typename T, typename Formula>
class ParamSums {
   public:
    static constexpr bool kLearns = true;

    DML_INLINE explicit ParamSums(const double* params, double* sums)
        : ParamSums(params, sums, std::make_index_sequence<kCount == 0 ? 1 : kCount>()) {}

    // The pairs [begin, end) of a row. context(j): what the terms of pair j see.
    template <typename Kind, typename Context>
    DML_INLINE void add(const Kind& kind, const T* s, const T* coefficient, int64_t begin, int64_t end,
                        const Context& context) const {
        for (int k = 0; k < kCount; ++k) {
            const ByParam<T, Formula> by_param = by_param_[k];
            T sum = T(0);
#pragma omp simd reduction(+ : sum)
            for (int64_t j = begin; j < end; ++j) {
                const T derivative = kind.by_param(by_param, s[j], context(j));
                sum += coefficient[j] != T(0) ? coefficient[j] * derivative : T(0);  // no 0 * inf
            }
            sums_[k] += double(sum);
        }
    }

   private:
    static constexpr int kCount = count_names(Formula::kParams);

    template <size_t... k>
    DML_INLINE ParamSums(const double* params, double* sums, std::index_sequence<k...>)
        : by_param_{ByParam<T, Formula>(params, k)...}, sums_(sums) {}

    const ByParam<T, Formula> by_param_[kCount == 0 ? 1 : kCount];
    double* const sums_;  // [kCount]
};

}  // namespace dml::cpu::DML_ISA
