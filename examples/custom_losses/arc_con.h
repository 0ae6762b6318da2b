// arc_con.h: Zhang et al., "A Contrastive Framework for Learning Sentence Representations from Pairwise and
// Triple-wise Perspective in Angular Space", ACL 2022, equation 2: for each positive
// log(1 + sum_n exp(scale (s_n - cos(theta_p + margin)))), with the margin in radians.
template <typename T>
struct ArcCon : FormulaDefaults {
    static constexpr const char* kParams = "scale = 20, margin = 0.2";
    static constexpr Accumulator kPos = Accumulator::kSum;
    static constexpr bool kContext = true, kNeedsPos = true;
    static constexpr Count kCount = Count::kPairs;

    T scale, cosine, sine;

    DML_INLINE explicit ArcCon(Params<T> params)
        : scale(T(params[0])), cosine(T(cos(params[1]))), sine(T(sin(params[1]))) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(scale, s);
    }
    // lse: the log-sum-exp of the row's negatives. Without negatives it is -inf and the loss is 0.
    template <typename S, typename C>
    DML_INLINE auto pos_term(S s, C lse) const {
        const S turned = cosine * s - sine * root(relu((T(1) - s) * (T(1) + s)));
        const auto z = lse - rounded_product(scale, turned);
        return is_empty(lse) ? decltype(z)(T(0)) : softplus(z);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return {g.pos, g.pos_count};
    }
};
