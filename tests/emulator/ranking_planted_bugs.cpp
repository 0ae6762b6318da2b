// Runs the kernels on ranks and writes losses, counts, weights and derivatives to stdout: batches in which each bug
// that test_ranking_emulated.py plants in them shows.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "cuda/triplets/triplets.h"
#include "sanitized.h"

using namespace dml;
using namespace dml::cuda;

namespace {

template <typename T>
void show(const std::vector<T>& values) {
    std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// A row a class, of which every third column is; the first two columns are the first row and not a valid reference.
void run(Ranking loss, int64_t columns) {
    using T = double;
    constexpr int64_t kRows = 3;
    std::vector<T> s(kRows * columns), losses(kRows);
    for (int64_t k = 0; k < kRows * columns; ++k) s[k] = std::cos(0.37 * double(k * k % 1009));
    std::vector<int64_t> members, begin(kRows), end(kRows), counts(2 * kRows), self_index = {0, -1, -1};
    for (int64_t i = 0; i < kRows; ++i) {
        begin[i] = int64_t(members.size());
        for (int64_t j = i; j < columns; j += kRows) members.push_back(j);
        end[i] = int64_t(members.size());
    }
    const int64_t valid = columns - 2;
    const TripletRowBlock<T> block = {s.data(),       kRows,        columns,    columns,           0,
                                      members.data(), begin.data(), end.data(), self_index.data(), false,
                                      &valid};
    std::vector<double> weights = {0.5, 1.0, 2.0}, by_params(2 * kRows);
    const RankingRules rules = {loss, true, 0.3, 1.0, {1, 2, 4}, 3, 6, false, true};
    const int64_t bytes = triplet_workspace_bytes<T>(kRows, ranking_space(rules, columns));
    std::vector<unsigned char> workspace(static_cast<size_t>(bytes), 0xff);  // NaN, and far indices
    ranking_rows(block, rules, weights.data(), losses.data(), counts.data(), by_params.data(),
                 workspace.data(), nullptr);
    show(losses);
    show(counts);
    show(by_params);
    show(s);
}

}  // namespace

int main() {
    return watched([] {
        for (const Ranking loss : {Ranking::kSmoothAP, Ranking::kRecallAtK, Ranking::kFastAP}) {
            run(loss, 21);
            run(loss, 901);  // more columns, and more positives, than a block has threads
        }
    });
}
