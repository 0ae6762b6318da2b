// The entry points on triplets and ranks, built for the host with the emulator, behind a C interface for ctypes.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/triplets/triplets.h"
#include "guarded.h"
#include "machine.h"

using namespace dml;
using namespace dml::cuda;

namespace {

struct Arguments {  // as in library.py, field by field
    void* s;
    int64_t rows, columns, pitch, first;
    const int64_t *members, *begin, *end, *self_index;
    int64_t square;
    const int64_t* num_valid_refs;
    int64_t term, positives, negatives;
    double params[kTripletParams];
    int64_t euclidean, write;
    const int64_t* seed;
    const int64_t *anchors, *anchors_positives;
    int64_t pairs, of_positives;
};

template <typename T>
TripletRowBlock<T> row_block_of(const Arguments& a) {
    TripletRowBlock<T> block = {};
    block.s = static_cast<T*>(a.s);
    block.rows = a.rows;
    block.columns = a.columns;
    block.pitch = a.pitch;
    block.first = a.first;
    block.members = a.members;
    block.begin = a.begin;
    block.end = a.end;
    block.self_index = a.self_index;
    block.square = a.square != 0;
    block.num_valid_refs = a.num_valid_refs;
    return block;
}

TripletRules rules_of(const Arguments& a) {
    TripletRules rules = {static_cast<TripletTerm>(a.term),
                          static_cast<Selection>(a.positives),
                          static_cast<Selection>(a.negatives),
                          {},
                          a.euclidean != 0,
                          a.write != 0,
                          a.seed};
    std::memcpy(rules.params, a.params, sizeof rules.params);
    return rules;
}

// A workspace between two guards.
class Workspace {
   public:
    explicit Workspace(int64_t bytes) : memory_(size_t(bytes) + 2 * kGuard, 0xFF) {}
    void* data() { return memory_.data() + kGuard; }
    void check() const {
        for (size_t k = 0; k < kGuard; ++k) {
            if (memory_[k] != 0xFF || memory_[memory_.size() - 1 - k] != 0xFF)
                throw std::runtime_error("the workspace's guard was overwritten");
        }
    }

   private:
    static constexpr size_t kGuard = 64;
    std::vector<unsigned char> memory_;
};

template <typename F>
void with_type(int64_t wide, const F& f) {
    if (wide) {
        f(double());
    } else {
        f(float());
    }
}

}  // namespace

extern "C" {

int dml_triplet_rows(const Arguments* a, int64_t wide, const void* row_params, void* sums, int64_t* counts,
                     void* grad_row_params, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        with_type(wide, [&](auto number) {
            using T = decltype(number);
            Workspace workspace(triplet_workspace_bytes<T>(a->rows, a->columns));
            triplet_rows(row_block_of<T>(*a), rules_of(*a), static_cast<const T*>(row_params),
                         static_cast<T*>(sums), counts, static_cast<T*>(grad_row_params), workspace.data(),
                         nullptr);
            workspace.check();
        });
    });
}

// numbers: temperature, temperature_k, then the cut-offs.
int dml_ranking_rows(const Arguments* a, int64_t wide, int64_t loss, const double* numbers, int64_t cutoffs,
                     int64_t bins, const double* row_weights, void* losses, int64_t* counts,
                     double* by_params, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        RankingRules rules = {};
        rules.loss = static_cast<Ranking>(loss);
        rules.possible = true;
        rules.temperature = numbers[0];
        rules.temperature_k = numbers[1];
        std::copy(numbers + 2, numbers + 2 + cutoffs, rules.cutoffs);
        rules.cutoff_count = int(cutoffs);
        rules.bins = bins;
        rules.euclidean = a->euclidean != 0;
        rules.write = a->write != 0;
        with_type(wide, [&](auto number) {
            using T = decltype(number);
            Workspace workspace(triplet_workspace_bytes<T>(a->rows, ranking_space(rules, a->columns)));
            ranking_rows(row_block_of<T>(*a), rules, row_weights, static_cast<T*>(losses), counts, by_params,
                         workspace.data(), nullptr);
            workspace.check();
        });
    });
}

int dml_select_rows(const Arguments* a, int64_t wide, int64_t* columns, void* similarities, char* error,
                    int64_t capacity) {
    return guarded(error, capacity, [&] {
        with_type(wide, [&](auto number) {
            using T = decltype(number);
            Workspace workspace(triplet_workspace_bytes<T>(a->rows, a->columns));
            select_rows(
                row_block_of<T>(*a), rules_of(*a),
                {a->anchors != nullptr, a->anchors, a->anchors_positives, a->pairs, a->of_positives != 0},
                columns, static_cast<T*>(similarities), workspace.data(), nullptr);
            workspace.check();
        });
    });
}

int dml_make_distances(const Arguments* a, int64_t wide, const void* x, const void* x_squares, const void* y,
                       const void* y_squares, int64_t dim, char* error, int64_t capacity) {
    return guarded(error, capacity, [&] {
        with_type(wide, [&](auto number) {
            using T = decltype(number);
            make_distances(row_block_of<T>(*a), static_cast<const T*>(x), static_cast<const T*>(x_squares),
                           static_cast<const T*>(y), static_cast<const T*>(y_squares), dim, nullptr);
        });
    });
}

}  // extern "C"
