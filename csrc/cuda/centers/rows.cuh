// A row's similarities to the classes of a block, by one thread block: a tile of classes at a time in shared memory,
// a thread a class.
#pragma once

#include "cuda/centers/centers.h"
#include "cuda/triplets/block.cuh"

namespace dml::cuda {

// Classes of a row that are staged together: [classes, pitch], with an odd pitch, so that threads that walk along
// neighbouring classes do not meet in a bank. Classes with very many centres stay in global memory.
struct CenterTile {
    int classes, pitch;
    bool staged;

    static constexpr int kBytes = 40 * 1024, kFrom = 128;  // after block_merge's

    template <typename T>
    static CenterTile of(int64_t per_class) {
        const int64_t pitch = per_class | 1, most = kBytes / int(sizeof(T)) / pitch;
        const int64_t classes = most < 1 || most > kTripletThreads ? kTripletThreads : most;
        return {int(classes), int(pitch), most >= 1};
    }
    template <typename T>
    size_t shared_bytes() const {
        return kFrom + (staged ? size_t(classes) * size_t(pitch) * sizeof(T) : 0);
    }
};

template <typename T>
struct CenterRowView {
    const CenterBlock<T>& block;
    const CenterTile tile;
    const int64_t row;

    // Calls visit(products, factors of theirs, where they are staged) for the elements of classes
    // [from, from + count) that are this thread's.
    template <typename Visit>
    DML_DEVICE void for_each_element(int64_t from, int count, const Visit& visit) const {
        const int per_class = int(block.per_class);
        T* const s = block.s + (row * block.classes + from) * per_class;
        const T* const inverse = block.center_inverse + from * per_class;
        const T own = block.row_inverse[row];
        const int step_class = kTripletThreads / per_class, step_center = kTripletThreads % per_class;
        int c = int(threadIdx.x) / per_class, k = int(threadIdx.x) % per_class;
        for (int e = int(threadIdx.x); c < count; e += kTripletThreads) {
            visit(s[e], own * inverse[e], c * tile.pitch + k);
            c += step_class;
            k += step_center;
            if (k >= per_class) {
                k -= per_class;
                ++c;
            }
        }
    }

    // Calls visit(class of the block, its similarities, what the policy makes of them); with kWrite what visit
    // leaves in their place, times both inverse lengths, replaces the products.
    template <bool kWrite, typename Policy, typename Visit>
    DML_DEVICE void for_each_class(const Policy& policy, const Visit& visit) const {
        const int64_t per_class = block.per_class;
        T* const shared =
            tile.staged ? shared_array<T>(CenterTile::kFrom, tile.classes * tile.pitch) : nullptr;
        for (int64_t from = 0; from < block.classes; from += tile.classes) {
            const int64_t left = block.classes - from;
            const int count = left < tile.classes ? int(left) : tile.classes;
            if (tile.staged) {
                for_each_element(from, count, [&](T& s, T factor, int at) { shared[at] = s * factor; });
                block_sync();
            }
            const int c = int(threadIdx.x);
            if (c < count) {
                const int64_t first = (row * block.classes + from + c) * per_class;
                T* const s = tile.staged ? shared + c * tile.pitch : block.s + first;
                const auto rescale = [&] {
                    if (tile.staged) return;
                    const T* const inverse = block.center_inverse + (from + c) * per_class;
                    for (int64_t k = 0; k < per_class; ++k) s[k] *= block.row_inverse[row] * inverse[k];
                };
                rescale();
                PooledCenters<T> pooled;
                for (int64_t k = 0; k < per_class; ++k) pooled = policy.find(pooled, s[k], T(k));
                for (int64_t k = 0; k < per_class; ++k) pooled = policy.add(pooled, s[k]);
                visit(from + c, s, policy.close(pooled));
                if constexpr (kWrite) rescale();
            }
            if (!tile.staged) continue;
            block_sync();
            if constexpr (kWrite)  // a thread stages what it stores: no barrier before the next tile
                for_each_element(from, count, [&](T& s, T factor, int at) { s = shared[at] * factor; });
        }
    }
};

template <typename T, typename Policy>
__global__ void __launch_bounds__(kTripletThreads, 2)
    center_row_losses(CenterBlock<T> block, CenterTile tile, CenterParams params, CenterRow<T>* rows,
                      T* losses, T* saved) {
    const Policy policy(params);
    const int64_t row = blockIdx.x, own = block.labels[row] - block.first_class;
    if (!block.has_class(row)) {
        if (threadIdx.x != 0 || !block.is_last()) return;
        losses[row] = T(0);
        SavedCenters<T>::at(saved, block.rows).put_nothing(row);
        return;
    }
    LogSumExp<T> others;
    const CenterRowView<T> view{block, tile, row};
    view.template for_each_class<false>(policy, [&](int64_t c, const T*, const PooledCenters<T>& pooled) {
        if (c == own) {
            rows[row].own = policy.scale * policy.own(pooled.value).value;
        } else {
            others.merge(rounded_product(policy.scale, pooled.value), T(1));
        }
    });
    const T most = merge_max(others.max);
    const T sum = merge_sum(others.empty() ? T(0) : others.sum * std::exp(others.max - most));
    if (threadIdx.x != 0) return;
    CenterRow<T> state;
    if (!block.is_first()) state.others = rows[row].others;
    state.others.merge(sum == sum ? most : sum, sum);
    rows[row].others = state.others;
    if (!block.is_last()) return;
    state.own = rows[row].own;
    const CenterResult<T> result(state);
    losses[row] = result.loss;
    SavedCenters<T>::at(saved, block.rows).put(row, result);
}

template <typename T, typename Policy>
__global__ void __launch_bounds__(kTripletThreads, 2)
    center_row_weights(CenterBlock<T> block, CenterTile tile, CenterParams params, const T* grad,
                       const T* saved, double* by_params) {
    const Policy policy(params);
    const int64_t row = blockIdx.x, own = block.labels[row] - block.first_class;
    if (!block.has_class(row)) {
        const int64_t width = block.classes * block.per_class;
        for (int64_t e = threadIdx.x; e < width; e += kTripletThreads) block.s[row * width + e] = T(0);
        return;
    }
    const auto of_forward = SavedCenters<const T>::at(saved, block.rows);
    const T by_own = -grad[row] * of_forward.miss[row], by_other = grad[row] * of_forward.share[row];
    const T most = of_forward.most[row];
    double by_scale = 0, by_param[2] = {0, 0};
    const CenterRowView<T> view{block, tile, row};
    view.template for_each_class<true>(policy, [&](int64_t c, T* s, const PooledCenters<T>& pooled) {
        T by_logit, by_value;
        if (c == own) {
            const OwnSimilarity<T> similarity = policy.own(pooled.value);
            by_logit = by_own;
            by_value = by_logit * policy.scale;
            by_scale += double(by_logit * similarity.value);
            by_param[0] += double(by_value * similarity.by_params[0]);
            by_param[1] += double(by_value * similarity.by_params[1]);
            by_value *= similarity.by_s;
        } else {
            by_logit = by_other * std::exp(rounded_product(policy.scale, pooled.value) - most);
            by_value = by_logit * policy.scale;
            by_scale += double(by_logit * pooled.value);
        }
        T by_pooling = T(0);
        for (int64_t k = 0; k < block.per_class; ++k) {
            const CenterDerivatives<T> d = policy.derivatives(pooled, s[k], T(k));
            by_pooling += d.by_param;
            s[k] = by_value * d.by_s;
        }
        by_param[0] += double(by_value * by_pooling);
    });
    if (!by_params) return;
    by_scale = merge_sum(by_scale);
    by_param[0] = merge_sum(by_param[0]);
    by_param[1] = merge_sum(by_param[1]);
    if (threadIdx.x != 0) return;
    by_params[kCenterParams * row] += by_scale;
    by_params[kCenterParams * row + 1] += by_param[0];
    by_params[kCenterParams * row + 2] += by_param[1];
}

}  // namespace dml::cuda
