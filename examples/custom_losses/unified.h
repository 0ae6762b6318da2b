// unified.h: Sun et al., "Circle Loss", CVPR 2020, equation 1 without a margin: every positive against every
// negative, log(1 + sum_n sum_p exp(scale (s_n - s_p))).
template <typename T>
struct Unified : FormulaDefaults {
    static constexpr const char* kParams = "scale = 16";
    static constexpr bool kNeedsPos = true, kNeedsNeg = true;

    T scale;

    DML_INLINE explicit Unified(Params<T> params) : scale(T(params[0])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(scale, s);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return rounded_product(-scale, s);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return softplus(g.neg + g.pos);
    }
};
