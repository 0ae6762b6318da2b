// The bodies of center_kernels.h. Included after product_kernels_impl.h, whose transpose they use: with the classes
// of a chunk side by side, loops over classes are vectors.

namespace dml::cpu::DML_ISA {

// Classes [from, from + count) of a block as a row sees them.
template <typename T>
struct CenterChunk {
    int64_t count;
    T* s;        // [count, per_class]
    T* by_kind;  // [per_class, kCenterChunk] the same, transposed
    alignas(64) T most[kCenterChunk];
    alignas(64) T extra[kCenterChunk];
    alignas(64) T value[kCenterChunk];
};

template <typename T>
DML_INLINE void scale_centers(T* s, int64_t count, const T* center_inverse, T factor) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) s[j] *= center_inverse[j] * factor;
}

// Calls step(what was pooled before, class) for the classes of a chunk. The compiler makes vectors of the loop only where
// arrays and captured values are locals.
template <typename T, typename Step>
DML_INLINE void for_pooled(CenterChunk<T>& chunk, const Step& step) {
    T *const most = chunk.most, *const extra = chunk.extra, *const value = chunk.value;
    const int64_t count = chunk.count;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
        const PooledCenters<T> pooled = step(PooledCenters<T>{most[c], extra[c], value[c]}, c);
        most[c] = pooled.most;
        extra[c] = pooled.extra;
        value[c] = pooled.value;
    }
}

template <typename T, typename Policy>
DML_INLINE void pool_centers(const Policy policy, int64_t per_class, CenterChunk<T>& chunk) {
    for_pooled(chunk, [](const PooledCenters<T>&, int64_t) DML_INLINE_LAMBDA { return PooledCenters<T>(); });
    for (int64_t k = 0; k < per_class; ++k) {
        const T* const s = chunk.by_kind + k * kCenterChunk;
        const T center = static_cast<T>(k);
        for_pooled(chunk, [=](const PooledCenters<T>& before, int64_t c)
                              DML_INLINE_LAMBDA { return policy.find(before, s[c], center); });
    }
    for (int64_t k = 0; k < per_class; ++k) {
        const T* const s = chunk.by_kind + k * kCenterChunk;
        for_pooled(chunk, [=](const PooledCenters<T>& before, int64_t c)
                              DML_INLINE_LAMBDA { return policy.add(before, s[c]); });
    }
    for_pooled(chunk,
               [=](const PooledCenters<T>& sums, int64_t) DML_INLINE_LAMBDA { return policy.close(sums); });
}

// Calls visit(chunk, first class) for the chunks of a row.
template <typename T, typename Policy, typename Visit>
DML_INLINE void for_center_chunks(const CenterBlock<T>& block, const Policy& policy, int64_t row, T* scratch,
                                  const Visit& visit) {
    CenterChunk<T> chunk;
    chunk.by_kind = scratch;
    const int64_t per_class = block.per_class;
    T* const s = block.s + row * block.classes * per_class;
    for (int64_t from = 0; from < block.classes; from += kCenterChunk) {
        chunk.count = block.classes - from < kCenterChunk ? block.classes - from : kCenterChunk;
        chunk.s = s + from * per_class;
        scale_centers(chunk.s, chunk.count * per_class, block.center_inverse + from * per_class,
                      block.row_inverse[row]);
        transpose(chunk.count, per_class, chunk.s, per_class, chunk.by_kind, kCenterChunk);
        pool_centers(policy, per_class, chunk);
        visit(chunk, from);
    }
}

template <typename T, typename Policy>
void centers_forward(const CenterBlock<T>& block, const CenterParams& params, int64_t row, T* scratch,
                     CenterRow<T>& state) {
    const Policy policy(params);
    const T scale = policy.scale;
    const int64_t own = block.labels[row] - block.first_class;
    const auto visit = [&](CenterChunk<T>& chunk, int64_t from) DML_INLINE_LAMBDA {
        T* const logits = chunk.value;
        if (own >= from && own < from + chunk.count) {
            state.own = scale * policy.own(logits[own - from]).value;
            logits[own - from] = -infinity<T>();
        }
        T most = -infinity<T>(), sum = T(0);
#pragma omp simd reduction(max : most)
        for (int64_t c = 0; c < chunk.count; ++c) {
            const T logit = logits[c] > -infinity<T>() ? scale * logits[c] : logits[c];
            logits[c] = logit;
            most = logit > most ? logit : most;
        }
        const T centre = most > -infinity<T>() ? most : T(0);
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < chunk.count; ++c) sum += exp_fast(logits[c] - centre);
        state.others.merge(sum == sum ? most : sum, sum);
    };
    for_center_chunks<T>(block, policy, row, scratch, visit);
}

template <typename T, typename Policy>
void centers_backward(const CenterBlock<T>& block, const CenterParams& params, int64_t row, T* scratch,
                      T grad, const SavedCenters<const T>& saved, double* by_params) {
    const T by_own = -grad * saved.miss[row], by_other = grad * saved.share[row], most = saved.most[row];
    const Policy policy(params);
    const T scale = policy.scale;
    const int64_t per_class = block.per_class, own = block.labels[row] - block.first_class;
    const auto visit = [&](CenterChunk<T>& chunk, int64_t from) DML_INLINE_LAMBDA {
        alignas(64) T by_logit[kCenterChunk];
        alignas(64) T by_value[kCenterChunk];
        T by_scale = T(0), by_param = T(0);
        // Logits are stored first: fused with the difference, a product would not be rounded as in forward.
#pragma omp simd
        for (int64_t c = 0; c < chunk.count; ++c) by_logit[c] = scale * chunk.value[c];
#pragma omp simd
        for (int64_t c = 0; c < chunk.count; ++c) {
            by_logit[c] = by_other * exp_fast(by_logit[c] - most);
            by_value[c] = by_logit[c] * scale;
        }
        if (own >= from && own < from + chunk.count) {
            const int64_t c = own - from;
            const OwnSimilarity<T> similarity = policy.own(chunk.value[c]);
            by_logit[c] = by_own;
            by_value[c] = by_own * scale * similarity.by_s;
            by_scale = by_own * (similarity.value - chunk.value[c]);
            if (by_params) {
                by_params[1] += static_cast<double>(by_own * scale * similarity.by_params[0]);
                by_params[2] += static_cast<double>(by_own * scale * similarity.by_params[1]);
            }
        }
#pragma omp simd reduction(+ : by_scale)
        for (int64_t c = 0; c < chunk.count; ++c) by_scale += by_logit[c] * chunk.value[c];
        const T *const most_s = chunk.most, *const extra = chunk.extra, *const value = chunk.value;
        const int64_t count = chunk.count;
        const Policy local = policy;
        for (int64_t k = 0; k < per_class; ++k) {
            T* const s = chunk.by_kind + k * kCenterChunk;
            const T center = static_cast<T>(k);
#pragma omp simd reduction(+ : by_param)
            for (int64_t c = 0; c < count; ++c) {
                const PooledCenters<T> pooled{most_s[c], extra[c], value[c]};
                const CenterDerivatives<T> d = local.derivatives(pooled, s[c], center);
                by_param += by_value[c] * d.by_param;
                s[c] = by_value[c] * d.by_s;
            }
        }
        transpose(per_class, chunk.count, chunk.by_kind, kCenterChunk, chunk.s, per_class);
        scale_centers(chunk.s, chunk.count * per_class, block.center_inverse + from * per_class,
                      block.row_inverse[row]);
        if (by_params) {
            by_params[0] += static_cast<double>(by_scale);
            by_params[1] += static_cast<double>(by_param);
        }
    };
    for_center_chunks<T>(block, policy, row, scratch, visit);
}

template <typename T>
const CenterKernels<T>& centers() {
    static const CenterKernels<T> table = {
        {centers_forward<T, SoftTriple<T>>, centers_forward<T, SubCenters<T>>},
        {centers_backward<T, SoftTriple<T>>, centers_backward<T, SubCenters<T>>}};
    return table;
}

template const CenterKernels<float>& centers<float>();
template const CenterKernels<double>& centers<double>();

}  // namespace dml::cpu::DML_ISA
