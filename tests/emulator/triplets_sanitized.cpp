// Runs the kernels on triplets and ranks for the sanitizers to watch: each array is a heap block of exactly its size.
#include <limits>
#include <memory>
#include <vector>

#include "cuda/triplets/triplets.h"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

// A batch of classes that take turns, and its similarities.
template <typename T>
struct Batch {
    explicit Batch(int64_t n, int64_t classes) : s(n * n), begin(n), end(n), n_(n) {
        refill();
        for (int64_t c = 0; c < classes; ++c) {
            const int64_t first = int64_t(members.size());
            for (int64_t i = c; i < n; i += classes) members.push_back(i);
            for (int64_t i = c; i < n; i += classes) {
                begin[i] = first;
                end[i] = int64_t(members.size());
            }
        }
    }
    void refill() {
        for (int64_t k = 0; k < n_ * n_; ++k) s[k] = -T(0.3) - T((k * 7919) % 101) / T(90);
    }
    TripletRowBlock<T> row_block() {
        return {s.data(), n_, n_, n_, 0, members.data(), begin.data(), end.data(), nullptr, true, nullptr};
    }

    std::vector<T> s;
    std::vector<int64_t> members, begin, end;

   private:
    int64_t n_;
};

template <typename T>
void run_ranking(int64_t n, int64_t classes, Ranking loss, int64_t bins) {
    Batch<T> batch(n, classes);
    std::vector<T> losses(n);
    std::vector<int64_t> counts(2 * n);
    std::vector<double> weights(n, 0.5), by_params(2 * n);
    RankingRules rules = {loss, true, 0.1, 1.0, {1, 2, 4}, 3, bins, true, true};
    const int64_t bytes = triplet_workspace_bytes<T>(n, ranking_space(rules, n));
    const std::unique_ptr<unsigned char[]> workspace(new unsigned char[size_t(bytes)]);
    ranking_rows(batch.row_block(), rules, weights.data(), losses.data(), counts.data(), by_params.data(),
                 workspace.get(), nullptr);
}

template <typename T>
void run(int64_t n, int64_t classes, TripletTerm term, Selection negatives) {
    constexpr double kFar = std::numeric_limits<double>::infinity();
    Batch<T> batch(n, classes);
    std::vector<T> row_params(n, T(1)), sums(n), grad_row_params(n), found(n), x(n * 3), squares(n);
    std::vector<int64_t> counts(2 * n), columns(n), anchors(n), positives(n);
    for (int64_t i = 0; i < n; ++i) {
        anchors[i] = i / 2;
        positives[i] = (i / 2 + classes) % n;
        for (int64_t d = 0; d < 3; ++d) x[3 * i + d] = T((i + d) % 5);
        for (int64_t d = 0; d < 3; ++d) squares[i] += x[3 * i + d] * x[3 * i + d];
    }
    const int64_t seed = 5;
    const TripletRowBlock<T> row_block = batch.row_block();
    const TripletRules rules = {term,      Selection::kAll,
                                negatives, {0.1, -kFar, kFar, -kFar, kFar, -kFar, 1.3, 0.5, 1.4, 8.0},
                                true,      true,
                                &seed};
    const int64_t bytes = triplet_workspace_bytes<T>(n, n);
    const std::unique_ptr<unsigned char[]> workspace(new unsigned char[size_t(bytes)]);
    make_distances(row_block, x.data(), squares.data(), x.data(), squares.data(), 3, nullptr);
    batch.refill();
    triplet_rows(row_block, rules, row_params.data(), sums.data(), counts.data(), grad_row_params.data(),
                 workspace.get(), nullptr);
    if (negatives == Selection::kAll) return;
    batch.refill();
    select_rows(row_block, rules, {true, anchors.data(), positives.data(), n, false}, columns.data(),
                found.data(), workspace.get(), nullptr);
}

}  // namespace

int main() {
    return watched([] {
        for (const TripletTerm term : {TripletTerm::kHinge, TripletTerm::kSoftplus, TripletTerm::kMargin}) {
            run<float>(13, 3, term, Selection::kAll);
            run<double>(40, 1, term, Selection::kAll);
        }
        run<double>(70, 1, TripletTerm::kHinge, Selection::kAll);
        run<float>(90, 2, TripletTerm::kHinge, Selection::kAll);
        for (const Ranking loss : {Ranking::kSmoothAP, Ranking::kRecallAtK, Ranking::kFastAP}) {
            run_ranking<float>(13, 3, loss, 10);
            run_ranking<double>(40, 1, loss, 30);
            run_ranking<double>(6, 6, loss, 10);
        }
        for (const Selection negatives :
             {Selection::kHardest, Selection::kEasiest, Selection::kSemihard, Selection::kDrawn}) {
            run<float>(13, 3, TripletTerm::kHinge, negatives);
            run<double>(40, 2, TripletTerm::kMargin, negatives);
        }
    });
}
