// The columns of a call: how many rows of ref_emb take part.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>

#include "torch/ops.h"

namespace dml::cpu {

// The first `count` rows of a tensor; all without a count.
inline OptionalTensor first_rows(const OptionalTensor& x, const OptionalTensor& count) {
    if (!x || !count) return x;
    return x->narrow(0, 0, std::clamp<int64_t>(count->item<int64_t>(), 0, x->size(0)));
}

// The valid rows of ref_emb and ref_labels, and the capacity: all rows of ref_emb.
struct References {
    OptionalTensor points, labels;
    int64_t capacity;

    explicit References(const PairBatch& batch)
        : points(first_rows(batch.ref_emb, batch.num_valid_refs)),
          labels(first_rows(batch.ref_labels, batch.num_valid_refs)),
          capacity((batch.ref_emb ? *batch.ref_emb : batch.embeddings).size(0)) {
        TORCH_CHECK_VALUE(std::max(batch.embeddings.size(0), capacity) < std::numeric_limits<int32_t>::max(),
                          "embeddings: too many rows, ", std::max(batch.embeddings.size(0), capacity));
    }
    int64_t count(const PairBatch& batch) const {
        return points ? points->size(0) : batch.embeddings.size(0);
    }
};

// The weights of rows in the type that is computed in; undefined where none are given.
template <typename T>
at::Tensor row_weights(const Call& call) {
    if (!call.row_weights) return {};
    return call.row_weights->to(c10::CppTypeToScalarType<T>::value).contiguous();
}

}  // namespace dml::cpu
