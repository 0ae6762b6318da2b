// What the matrix path leaves for backward.
#pragma once

#include "core/problem.h"
#include "cuda/common/copy.cuh"
#include "cuda/matrix/sizes.h"

namespace dml::cuda {

template <typename Acc>
struct SavedMatrix {
    Acc* header;                   // [kHeader]
    Acc *query_norms, *ref_norms;  // the same array where square
    Acc* pairs;                    // [rows, pitch] similarities, then dL_i/ds_ij in their place
    uint8_t* occupied;             // [rows, spans] a bit for each chunk of a row: whether it is not all 0
    int64_t rows, pitch, spans;

    SavedMatrix(const Problem& p, void* saved) : rows(p.queries.count) {
        const MatrixSizes<int64_t> at(rows, p.refs.count, p.square, sizeof(Acc));
        auto* bytes = static_cast<unsigned char*>(saved);
        header = reinterpret_cast<Acc*>(bytes);
        query_norms = header + kHeader;
        ref_norms = p.square ? query_norms : query_norms + rows;
        pairs = reinterpret_cast<Acc*>(bytes + at.matrix);
        occupied = bytes + at.occupied;
        pitch = at.pitch;
        spans = at.spans;
    }
    DML_DEVICE bool is_occupied(int64_t row, int64_t chunk) const {
        return occupied[row * spans + chunk / kChunksOfSpan] >> chunk % kChunksOfSpan & 1;
    }
    DML_DEVICE Matrix<Acc> matrix() const { return {pairs, pitch, rows, pitch}; }
};

}  // namespace dml::cuda
