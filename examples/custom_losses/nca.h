// nca.h: Goldberger et al., "Neighbourhood Components Analysis", NeurIPS 2004: -log of the probability that a
// row's neighbour, drawn by a softmax over similarities, is of its class.
template <typename T>
struct NCA : FormulaDefaults {
    static constexpr const char* kParams = "scale = 16";
    static constexpr bool kNeedsPos = true, kNeedsNeg = true;

    T scale;

    DML_INLINE explicit NCA(Params<T> params) : scale(T(params[0])) {}

    template <typename S>
    DML_INLINE S neg_term(S s) const {
        return rounded_product(scale, s);
    }
    template <typename S>
    DML_INLINE S pos_term(S s) const {
        return rounded_product(scale, s);
    }
    template <typename S>
    DML_INLINE RowLoss<S> row(const Gathered<S>& g) const {
        return softplus(g.neg - g.pos);
    }
};
