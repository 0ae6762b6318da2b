// The launches of the kernels on rows (rows.cuh, count.cuh), which read no points: they are compiled once for
// float and double (instantiations/matrix_rows.cu), not for each arithmetic.
#pragma once

#include "cuda/matrix/saved_matrix.cuh"
#include "cuda/pairs/pair_loss.h"
#include "cuda/pairs/row_stats.cuh"

namespace dml::cuda {

inline constexpr int64_t kMostRowBlocks = 2048;

// A slot of results for each of its blocks, a flag for each row, the ticket.
template <typename Acc>
struct RowsWorkspace {
    int64_t rows, slots;
    Acc* results;
    unsigned* ticket;
    uint8_t* flags;

    explicit RowsWorkspace(const Problem& p, void* workspace = nullptr)
        : rows(p.queries.count),
          slots(rows < 1                ? 1
                : rows < kMostRowBlocks ? rows
                                        : kMostRowBlocks),
          results(static_cast<Acc*>(workspace)) {
        auto* after = static_cast<unsigned char*>(workspace) + results_bytes();
        ticket = reinterpret_cast<unsigned*>(after);
        flags = after + 16;
    }
    int64_t results_bytes() const { return (kResultNumbers * slots * int64_t(sizeof(Acc)) + 15) / 16 * 16; }
    int64_t bytes() const { return results_bytes() + 16 + rows; }
};

void launch_rows(const Task& task, const SavedMatrix<float>& saved, bool has_backward,
                 const RowsWorkspace<float>& space, float* loss, Launches& launches);
void launch_rows(const Task& task, const SavedMatrix<double>& saved, bool has_backward,
                 const RowsWorkspace<double>& space, double* loss, Launches& launches);

// Rows [first, first + saved.rows) of the task's. counts: [2, all rows].
void launch_counts(const Task& task, const SavedMatrix<float>& saved, int64_t first, int64_t* counts,
                   Launches& launches);
void launch_counts(const Task& task, const SavedMatrix<double>& saved, int64_t first, int64_t* counts,
                   Launches& launches);

}  // namespace dml::cuda
