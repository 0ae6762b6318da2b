// The op triplet_list_loss: triplets given as a list, which is long compared with the number of pairs. It
// works on row blocks as triplet_loss does. One task owns a row and visits its triplets in the order of the
// list, so every sum has one order.
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/sort.h"
#include "cpu/triplets/result.h"

namespace dml::cpu {

using namespace triplet;

namespace {

struct TripletList {
    const int64_t *anchors, *positives, *negatives;  // [count]
    const bool* mask;                                // [count] or null: whether a triplet counts
    int64_t count;
};

// The triplets that count, grouped by anchor, in the order of the list: a parallel counting sort.
class ByAnchor {
   public:
    struct Pair {
        int32_t positive, negative;
    };

    ByAnchor(const TripletList& list, int64_t n, int64_t m) : begin_(n + 1) {
        // Few enough pieces that their counts, which one thread sums, are few compared with the triplets.
        const int64_t piece = std::max({kLeastPiece, (list.count + kMostPieces - 1) / kMostPieces, 4 * n});
        const int64_t pieces = (list.count + piece - 1) / piece;
        std::vector<int64_t> places(pieces * n);
        for_pieces(list.count, piece, 2 * list.count, [&](int64_t from, int64_t to) {
            int64_t* count = places.data() + from / piece * n;
            for (int64_t k = from; k < to; ++k) {
                check("anchors", list.anchors[k], n);
                if (list.mask && !list.mask[k]) continue;
                check("positives", list.positives[k], m);
                check("negatives", list.negatives[k], m);
                ++count[list.anchors[k]];
            }
        });
        int64_t place = 0;  // of an anchor's first triplet in a piece
        for (int64_t i = 0; i < n; ++i) {
            begin_[i] = place;
            for (int64_t p = 0; p < pieces; ++p) place += std::exchange(places[p * n + i], place);
        }
        begin_[n] = place;
        pairs_.reset(new Pair[place]);
        for_pieces(list.count, piece, 4 * list.count, [&](int64_t from, int64_t to) {
            int64_t* next = places.data() + from / piece * n;
            for (int64_t k = from; k < to; ++k) {
                if (list.mask && !list.mask[k]) continue;
                pairs_[next[list.anchors[k]]++] = {static_cast<int32_t>(list.positives[k]),
                                                   static_cast<int32_t>(list.negatives[k])};
            }
        });
    }

    int64_t count() const { return begin_.back(); }
    const Pair* begin(int64_t i) const { return pairs_.get() + begin_[i]; }
    const Pair* end(int64_t i) const { return pairs_.get() + begin_[i + 1]; }

   private:
    static void check(const char* name, int64_t index, int64_t size) {
        TORCH_CHECK_INDEX(index >= 0 && index < size, name, ": expected indices below ", size, ", got ",
                          index);
    }

    std::vector<int64_t> begin_;  // [n + 1]
    std::unique_ptr<Pair[]> pairs_;
};

template <typename T>
class ListLoss : public RowResults<T> {
   public:
    ListLoss(const Similarities<T>& similarities, const ByAnchor& triplets, TripletTerm term, T margin,
             const T* row_params, bool save)
        : RowResults<T>(similarities,
                        at::zeros({row_params && save ? similarities.n : 0}, similarities.rows.options())),
          similarities_(similarities),
          triplets_(triplets),
          term_(term),
          margin_(margin),
          row_params_(row_params),
          save_(save) {}

    void run(RowBlockGradient<T>* gradient) {
        similarities_.for_each_row_block([&](const RowBlock<T>& block) {
            const int64_t work = 1 + 8 * triplets_.count() / (similarities_.n * similarities_.m);
            similarities_.for_each_row(block, work, [&](int64_t i, T* s) { row(i, s); });
            if (gradient) gradient->add(block);
        });
    }

   private:
    struct Sums {
        double* by_d;  // [m] derivatives by the distances
        double terms = 0, by_param = 0;
        int64_t nonzero = 0, considered = 0;
    };

    void row(int64_t i, T* s) {
        static thread_local std::vector<double> by_d;
        by_d.assign(similarities_.m, 0.0);
        Sums sums{by_d.data()};
        const T margin = row_params_ ? row_params_[i] : margin_;
        if (term_ == TripletTerm::kHinge) {
            add<HingeTerm<T>>(margin, s, i, sums);
        } else if (term_ == TripletTerm::kSoftplus) {
            add<SoftplusTerm<T>>(margin, s, i, sums);
        } else {
            add_margin({row_params_[i], margin_}, s, i, sums);
        }
        this->sums.template data_ptr<T>()[i] = static_cast<T>(sums.terms);
        int64_t* count = this->counts.template data_ptr<int64_t>() + 2 * i;
        count[0] = sums.nonzero;
        count[1] = sums.considered;
        if (!save_) return;
        if (row_params_) this->grad_params.template data_ptr<T>()[i] = static_cast<T>(sums.by_param);
        // d similarity / d product is 1 / d where euclidean, taken as 0 at 0.
        const bool euclidean = similarities_.similarity.euclidean;
        for (int64_t j = 0; j < similarities_.m; ++j) {
            const double d = euclidean ? -static_cast<double>(s[j]) : 1.0;
            s[j] = d > 0 && by_d[j] != 0 ? static_cast<T>(-by_d[j] / d) : T(0);
        }
    }

    template <typename Term>
    void add(T margin, const T* s, int64_t i, Sums& sums) const {
        sums.considered = triplets_.end(i) - triplets_.begin(i);
        for (const auto* pair = triplets_.begin(i); pair < triplets_.end(i); ++pair) {
            const auto [p, n] = *pair;
            const T violation = (s[n] - s[p]) + margin;
            if (!Term::counts(violation)) continue;
            const double derivative = static_cast<double>(Term::derivative(violation));
            sums.terms += static_cast<double>(Term::value(violation));
            sums.nonzero += Term::nonzero(violation);
            sums.by_d[p] += derivative;
            sums.by_d[n] -= derivative;
            sums.by_param += derivative;
        }
    }

    void add_margin(const MarginTerms<T>& margin, const T* s, int64_t i, Sums& sums) const {
        sums.considered = triplets_.end(i) - triplets_.begin(i);
        for (const auto* pair = triplets_.begin(i); pair < triplets_.end(i); ++pair) {
            const auto [p, n] = *pair;
            const T of_pos = margin.positive(-s[p]), of_neg = margin.negative(-s[n]);
            const bool pulls = of_pos > T(0), pushes = of_neg > T(0);
            sums.terms += static_cast<double>(of_pos) + static_cast<double>(of_neg);
            sums.nonzero += int(pulls) + int(pushes);
            sums.by_d[p] += pulls;
            sums.by_d[n] -= pushes;
            sums.by_param += int(pushes) - int(pulls);
        }
    }

    const Similarities<T>& similarities_;
    const ByAnchor& triplets_;
    const TripletTerm term_;
    const T margin_;
    const T* const row_params_;  // [N] or null
    const bool save_;
};

RowLossResult triplet_list_loss(const Tensor& embeddings, const OptionalTensor& ref_emb,
                                const Tensor& anchors, const Tensor& positives, const Tensor& negatives,
                                const OptionalTensor& mask, const OptionalTensor& row_params,
                                c10::string_view term_name, double margin, c10::string_view similarity,
                                bool save, bool save_ref) {
    check_triplet_lists(embeddings, ref_emb, anchors, positives, negatives, mask);
    const TripletTerm term = parse_term(term_name);
    check_row_params(row_params, term == TripletTerm::kMargin, embeddings);
    const Tensor lists[] = {anchors.contiguous(), positives.contiguous(), negatives.contiguous()};
    const Tensor contiguous_mask = mask ? mask->contiguous() : Tensor();
    const TripletList list = {lists[0].const_data_ptr<int64_t>(), lists[1].const_data_ptr<int64_t>(),
                              lists[2].const_data_ptr<int64_t>(),
                              mask ? contiguous_mask.const_data_ptr<bool>() : nullptr, anchors.size(0)};
    const int64_t n = embeddings.size(0), m = (ref_emb ? *ref_emb : embeddings).size(0);
    TORCH_CHECK_VALUE(std::max(n, m) < std::numeric_limits<int32_t>::max(), "embeddings: too many rows, ",
                      std::max(n, m));
    const ByAnchor triplets(list, n, m);
    const auto run = [&](auto number) {
        using T = decltype(number);
        const Similarities<T> similarities(embeddings, ref_emb, similarity);
        const Tensor of_rows =
            row_params ? row_params->to(similarities.rows.options().dtype()).contiguous() : Tensor();
        ListLoss<T> loss(similarities, triplets, term, static_cast<T>(margin),
                         row_params ? of_rows.const_data_ptr<T>() : nullptr, save);
        return run_loss(similarities, loss, save, save_ref, similarities.m);
    };
    return embeddings.scalar_type() == at::kDouble ? run(double()) : run(float());
}

}  // namespace

TORCH_LIBRARY_IMPL(dml_cuda, CPU, m) { m.impl("triplet_list_loss", &triplet_list_loss); }

}  // namespace dml::cpu
