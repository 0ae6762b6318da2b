// The CPU engine on several threads, for ThreadSanitizer: every formula, with and without mining, on square
// and rectangular batches; listed pairs; triplets. The bytes must be the same for any number of threads.
// `cpu_engine race` plants a race in a task instead.
#include <ATen/Context.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

// Sources, as their ops are local to the files.
#include "cpu/pairs/listed_pairs.cpp"
#include "cpu/pairs/ring.cpp"
#include "cpu/triplets/list.cpp"
#include "cpu/triplets/loss.cpp"
#include "cpu/triplets/select.cpp"

namespace dml::cpu {
namespace {

using Tensors = std::vector<at::Tensor>;

int failures = 0;

bool same_bytes(const Tensor& a, const Tensor& b) {
    const Tensor x = a.contiguous(), y = b.contiguous();
    return x.sizes() == y.sizes() && std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

void check(const std::string& what, const std::function<Tensors()>& run) {
    Tensors first;
    for (const int threads : {1, 2, 5}) {
        at::thread_limit() = threads;
        const Tensors found = run();
        if (first.empty()) first = found;
        for (size_t k = 0; k < found.size(); ++k) {
            if (same_bytes(found[k], first[k])) continue;
            std::printf("%s: tensor %zu differs on %d threads\n", what.c_str(), k, threads);
            ++failures;
        }
    }
}

Tensor points(int64_t n, int64_t dim, at::ScalarType type) { return at::randn({n, dim}, type); }
Tensor classes(int64_t n) { return at::randint(n / 4 + 1, {n}, at::kLong); }

template <typename T>
void check_formula(const FormulaInfo& formula, int64_t n, int64_t m, int64_t dim,
                   std::optional<double> epsilon) {
    const at::ScalarType type = sizeof(T) == 8 ? at::kDouble : at::kFloat;
    const Tensor embeddings = points(n, dim, type), labels = classes(n);
    OptionalTensor ref_emb, ref_labels, self_index, num_valid_refs, row_weights;
    if (m > 0) {
        ref_emb = at::cat({embeddings, points(m - n, dim, type)});
        ref_labels = at::cat({labels, classes(m - n)});
        self_index = at::arange(n);
    }
    const std::vector<double> params(formula.params, 0.5);
    const Call call{{embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs},
                    {formula.name, params, epsilon, "cosine", "mean", true, false, false, "ieee", true, {}},
                    row_weights};
    check(std::string(formula.name) + (epsilon ? " mined" : ""), [&] {
        const auto [loss, saved] = forward<T>(call);
        const Tensor one = at::ones({}, loss.options());
        const auto [grad_emb, grad_ref, grad_params] = backward<T>(call, one, saved, true, m > 0, false);
        return m > 0 ? Tensors{loss, grad_emb, grad_ref} : Tensors{loss, grad_emb, grad_params};
    });
}

void check_lists(int64_t n, int64_t dim, int64_t pairs) {
    const Tensor x = points(n, dim, at::kFloat), rows = at::randint(n, {pairs}, at::kLong),
                 cols = at::randint(n, {pairs}, at::kLong);
    check("lists", [&] {
        const auto [r, c, offsets, fresh] = pair_sort(rows, cols, n, n);
        const auto [order, column_offsets] = column_order(c, n);
        const Tensor products = pair_products(x, x, r, c, offsets);
        const Tensor sums = segment_logsumexp(products, offsets, true);
        const Tensor weights = segment_softmax(sums, products, sums, offsets);
        return Tensors{r, c, offsets, fresh, order, column_offsets, sums, pair_sums(weights, x, c, offsets)};
    });
}

void check_triplets(int64_t n, int64_t m, int64_t dim) {
    const Tensor embeddings = points(n, dim, at::kFloat), labels = classes(n);
    OptionalTensor ref_emb, ref_labels;
    if (m > 0) ref_emb = points(m, dim, at::kFloat), ref_labels = classes(m);
    const Tensor seed = at::ones({1}, at::kLong);
    const double far = std::numeric_limits<double>::infinity();
    const std::vector<double> params = {0.2, -far, far, -far, far, -far, far, 0.5, 1.4, double(dim)};
    const OptionalTensor none, beta = at::ones({n});
    for (const char* term : {"hinge", "softplus", "margin"}) {
        for (const auto& [positives, negatives] :
             {std::pair("all", "all"), {"hardest", "hardest"}, {"all", "semihard"}, {"all", "drawn"}}) {
            check(std::string("triplets: ") + term + ", " + positives + " and " + negatives, [&] {
                const auto [sums, counts, grad_emb, grad_ref, grad_beta] =
                    triplet_loss({embeddings, labels, ref_emb, ref_labels, none, none},
                                 std::string_view(term) == "margin" ? beta : none, seed, term, positives,
                                 negatives, params, "euclidean", true, m > 0);
                return Tensors{sums, counts, grad_emb, grad_ref, grad_beta};
            });
        }
    }
    const Tensor anchors = at::arange(4 * n, at::kLong).div(4, "floor"),
                 columns = at::randint(m > 0 ? m : n, {2, 4 * n}, at::kLong);
    for (const char* term : {"hinge", "softplus", "margin"}) {
        check(std::string("listed triplets: ") + term, [&] {
            const auto [sums, counts, grad_emb, grad_ref, grad_beta] = triplet_list_loss(
                embeddings, ref_emb, anchors, columns[0], columns[1], none,
                std::string_view(term) == "margin" ? beta : none, term, 0.2, "euclidean", true, m > 0);
            return Tensors{sums, counts, grad_emb, grad_ref, grad_beta};
        });
    }
    check("select", [&] {
        const auto [column, similarity] = select({embeddings, labels, ref_emb, ref_labels, none, none}, seed,
                                                 "hardest_negative", params, none, none, "cosine");
        return Tensors{column, similarity};
    });
}

void race() {
    at::thread_limit() = 5;
    int64_t sum = 0;
    for_tasks(100, 100 * kTaskWork, [&](int64_t k) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // else one thread may run all tasks
        sum += k;
    });
    std::printf("%lld\n", static_cast<long long>(sum));
}

void run() {
    set_instruction_set("baseline");
    // Which task writes what depends on the batch and on mining, not on the formula: two of the four ways for
    // every formula, all four for the first.
    const std::optional<double> all_pairs, mined = 0.1;
    for (const FormulaInfo& formula : kFormulas) {
        check_formula<float>(formula, 200, 0, 24, mined);
        check_formula<float>(formula, 150, 230, 24, all_pairs);
    }
    check_formula<float>(kFormulas[0], 200, 0, 24, all_pairs);
    check_formula<float>(kFormulas[0], 150, 230, 24, mined);
    check_formula<double>(kFormulas[0], 600, 0, 40, 0.1);
    check_lists(300, 20, 40000);
    check_triplets(200, 0, 24);
    check_triplets(150, 230, 24);
}

}  // namespace
}  // namespace dml::cpu

int main(int count, char** arguments) {
    at::manual_seed(0);
    if (count > 1 && std::strcmp(arguments[1], "race") == 0) {
        dml::cpu::race();
    } else {
        dml::cpu::run();
    }
    return dml::cpu::failures > 0;
}
