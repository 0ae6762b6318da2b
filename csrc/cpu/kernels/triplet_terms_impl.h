// The triplets of a row: every positive with every negative, one by one or as runs of positives.

namespace dml::cpu::DML_ISA {

// d similarity / d product, up to the similarity's own sign.
template <typename T>
DML_INLINE T inverse_distance(bool euclidean, T s) {
    return !euclidean ? T(1) : s < T(0) ? T(-1) / s : T(0);
}

// Turns the derivatives by the similarities of a sweep into weights over the products, in their place.
template <typename T>
DML_INLINE void write_weights(T* s, int64_t from, int64_t to, const T* derivative, bool euclidean) {
#pragma omp simd
    for (int64_t j = from; j < to; ++j) {
        const T weight = derivative[j - from] * inverse_distance(euclidean, s[j]);
        s[j] = derivative[j - from] != T(0) ? weight : T(0);
    }
}

// ---- every positive with every negative -------------------------------------------------------------------

// Adds the triplets of positive k with a sweep's negatives.
template <typename T, typename Term, bool kInterval>
DML_INLINE void add_positive(RowTriplets<T>& row, int64_t k, int64_t from, int64_t to, T* derivatives) {
    const TripletParams<T> params = row.params;
    const T d_pos = row.positives[k];
    const T* s = row.s;
    T sum = 0, derivative = 0, nonzero = 0, considered = 0;
#pragma omp simd reduction(+ : sum, derivative, nonzero, considered)
    for (int64_t j = from; j < to; ++j) {
        const T d_neg = -s[j], violation = params.violation(d_pos, d_neg);
        const bool inside = !kInterval || params.considered(d_pos, d_neg);
        const bool counts = Term::counts(violation) & inside;
        const T by_d = counts ? Term::derivative(violation) : T(0);
        derivatives[j - from] += by_d;
        derivative += by_d;
        sum += counts ? Term::value(violation) : T(0);
        nonzero += (counts & Term::nonzero(violation)) ? T(1) : T(0);
        if (kInterval) considered += inside ? T(1) : T(0);
    }
    row.sum += sum;
    row.derivative[k] += derivative;
    row.nonzero += static_cast<int64_t>(nonzero);
    row.considered += static_cast<int64_t>(considered);
}

template <typename T, typename Term, bool kInterval>
DML_INLINE void add_positives(RowTriplets<T>& row, int64_t from, int64_t to, T* derivatives) {
    for (int64_t j = 0; j < to - from; ++j) derivatives[j] = T(0);
    for (int64_t k = 0; k < row.count; ++k) add_positive<T, Term, kInterval>(row, k, from, to, derivatives);
}

// ---- runs of positives ------------------------------------------------------------------------------------

// For each negative of a sweep: the first positive for which First holds, or the number of positives.
template <typename T, typename First>
DML_INLINE void search(const RowTriplets<T>& row, const First& first, int64_t from, int64_t to,
                       int32_t* found) {
    const TripletParams<T> params = row.params;
    const T *s = row.s, *positives = row.positives;
    const int32_t count = static_cast<int32_t>(row.count);
    int32_t step = 1;
    while (step * 2 <= count) step *= 2;
    for (int64_t j = 0; j < to - from; ++j) found[j] = 0;
    for (; step > 0; step /= 2) {
#pragma omp simd
        for (int64_t j = from; j < to; ++j) {
            const int32_t at = found[j - from];
            found[j - from] = first(params, positives[at + step - 1], -s[j]) ? at : at + step;
        }
    }
    for (int64_t j = 0; j < to - from; ++j) found[j] = found[j] < count ? found[j] : count;
}

// The run [begin, end) of positives of each negative of a sweep.
template <typename T, typename Term, bool kInterval>
DML_INLINE void find_runs(RowTriplets<T>& row, int64_t from, int64_t to, int32_t* begin, int32_t* end) {
    constexpr bool kViolating = std::is_same_v<Term, HingeTerm<T>>;
    const int32_t count = static_cast<int32_t>(row.count);
    const int64_t size = to - from;
    if constexpr (kInterval) {
        search(row, FirstBelowGapHigh<T>(), from, to, begin);
        search(row, FirstNotAboveGapLow<T>(), from, to, end);
        int64_t considered = 0;
#pragma omp simd reduction(+ : considered)
        for (int64_t j = 0; j < size; ++j) {
            end[j] = end[j] < begin[j] ? begin[j] : end[j];
            considered += end[j] - begin[j];
        }
        row.considered += considered;
    }
    if constexpr (kViolating) {
        int32_t violating[kSweep];
        search(row, FirstViolating<T>(), from, to, violating);
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) {
            const int32_t low = kInterval && begin[j] > violating[j] ? begin[j] : violating[j];
            const int32_t high = kInterval ? end[j] : count;
            begin[j] = low < high ? low : high;
            end[j] = high;
        }
    }
}

// Adds terms that are sums over runs: by prefix sums, with a difference array for the positives.
template <typename T, typename Term, bool kInterval>
DML_INLINE void add_runs(RowTriplets<T>& row, int64_t from, int64_t to, T* derivatives) {
    int32_t begin[kSweep], end[kSweep];
    const int64_t size = to - from;
    find_runs<T, Term, kInterval>(row, from, to, begin, end);
    for (int64_t j = 0; j < size; ++j) {
        ++row.steps[begin[j]];
        --row.steps[end[j]];
    }
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) derivatives[j] = static_cast<T>(end[j] - begin[j]);
    if constexpr (!std::is_same_v<Term, HingeTerm<T>>) return;
    const T* s = row.s + from;
    const double *prefix = row.prefix, margin = row.params.margin;
    double sum = 0;
    int64_t nonzero = 0;
#pragma omp simd reduction(+ : sum, nonzero)
    for (int64_t j = 0; j < size; ++j) {
        const int32_t length = end[j] - begin[j];
        const double terms = prefix[end[j]] - prefix[begin[j]] + length * (s[j] + margin);
        sum += length > 0 ? terms : 0.0;
        nonzero += length;
    }
    row.sum += sum;
    row.nonzero += nonzero;
}

// The number of runs that contain each positive, from the difference array.
template <typename T>
DML_INLINE void close_runs(RowTriplets<T>& row) {
    int64_t inside = 0;
    for (int64_t k = 0; k < row.count; ++k) {
        inside += row.steps[k];
        row.derivative[k] = static_cast<double>(inside);
    }
}

// ---- all negatives of a row -------------------------------------------------------------------------------

// Calls sweep(from, to) for the columns.
template <typename Sweep>
DML_INLINE void for_sweeps(int64_t m, const Sweep& sweep) {
    for (int64_t from = 0; from < m; from += kSweep) sweep(from, from + kSweep < m ? from + kSweep : m);
}

// Sums Term over the row, and passes the derivatives of each sweep's negatives to `then`.
template <typename T, typename Term, bool kInterval, typename Then>
DML_INLINE void all_terms(RowTriplets<T>& row, const Then& then) {
    alignas(64) T derivatives[kSweep];
    const bool runs = Term::kSearchable && row.prefix;
    if (!kInterval) row.considered = row.count * row.negatives;
    for_sweeps(row.m, [&](int64_t from, int64_t to) {
        if constexpr (Term::kSearchable) {
            if (runs) add_runs<T, Term, kInterval>(row, from, to, derivatives);
        }
        if (!runs) add_positives<T, Term, kInterval>(row, from, to, derivatives);
        then(from, to, derivatives);
    });
    if (runs) close_runs(row);
}

template <typename T, typename Term>
void all_triplets(RowTriplets<T>& row) {
    const auto write = [&](int64_t from, int64_t to, T* derivatives) {
        if (!row.write) return;
        write_weights(row.s, from, to, derivatives, row.euclidean);
    };
    if (row.interval) {
        all_terms<T, Term, true>(row, write);
    } else {
        all_terms<T, Term, false>(row, write);
    }
}

// The pair terms of the margin loss, each multiplied by the number of triplets of the pair.
template <typename T>
void all_margin(RowTriplets<T>& row) {
    const MarginTerms<T> terms{row.beta, row.params.margin};
    double by_beta = 0;
    const auto negatives = [&](int64_t from, int64_t to, T* uses) {
        const T* s = row.s + from;
        T sum = 0, nonzero = 0;
        int64_t count = 0;
#pragma omp simd reduction(+ : sum, nonzero)
        for (int64_t j = 0; j < to - from; ++j) {
            const T term = terms.negative(-s[j]);
            const T used = term > T(0) ? uses[j] : T(0);
            sum += used > T(0) ? used * term : T(0);
            nonzero += used > T(0) ? T(1) : T(0);
            uses[j] = used;
        }
        if (nonzero > T(0)) {
#pragma omp simd reduction(+ : count)
            for (int64_t j = 0; j < to - from; ++j) count += static_cast<int32_t>(uses[j]);
        }
        row.sum += sum;
        row.nonzero += count;
        by_beta += static_cast<double>(count);
        if (row.write) write_weights(row.s, from, to, uses, row.euclidean);
    };
    if (row.interval) {
        all_terms<T, CountedTerm<T>, true>(row, negatives);
    } else {
        alignas(64) T uses[kSweep];
        row.considered = row.count * row.negatives;
        for_sweeps(row.m, [&](int64_t from, int64_t to) {
            const T* s = row.s + from;
            const T all = static_cast<T>(row.count);
#pragma omp simd
            for (int64_t j = 0; j < to - from; ++j) uses[j] = s[j] == s[j] ? all : T(0);
            negatives(from, to, uses);
        });
        for (int64_t k = 0; k < row.count; ++k) row.derivative[k] = static_cast<double>(row.negatives);
    }
    for (int64_t k = 0; k < row.count; ++k) {
        const double uses = row.derivative[k];
        const T term = terms.positive(row.positives[k]);
        row.derivative[k] = term > T(0) ? uses : 0.0;
        row.sum += row.derivative[k] * static_cast<double>(term);
        row.nonzero += static_cast<int64_t>(row.derivative[k]);
        by_beta -= row.derivative[k];
    }
    row.by_param = by_beta;
}

}  // namespace dml::cpu::DML_ISA
