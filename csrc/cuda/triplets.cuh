// Triplets of a row, by one block: the row's similarities are at hand in global memory, its positives are
// gathered into a workspace, and every negative is compared with them, one by one where they are few, else as
// a run of the sorted ones that a search finds (../triplets.h). Sums are folded in a fixed order; what
// several threads add to one number are integers.
#pragma once

#include "rows.cuh"
#include "triplets.h"

namespace dml::cuda {

inline constexpr int kTripletThreads = 256, kTripletWarps = kTripletThreads / kWarpSize;
// Up to so many positives each is compared with every negative.
inline constexpr int64_t kFewTripletPositives = 32;

inline constexpr int kFoldBytes = kTripletWarps * int(sizeof(double));
inline constexpr size_t kTripletSharedBytes = kFoldBytes + (kTripletThreads + 1) * sizeof(double);

// ---- over a block -----------------------------------------------------------------------------------------

// op over all threads' x, in one order; every thread gets it.
template <typename T, typename Op>
DML_DEVICE T block_fold(T x, const Op& op) {
    static_assert(sizeof(T) <= sizeof(double));
    T* shared = reinterpret_cast<T*>(shared_array<double>(0, kTripletWarps));
#pragma unroll
    for (int m = kWarpSize / 2; m > 0; m /= 2) x = op(x, shfl_xor(x, m));
    if (lane_id() == 0) shared[warp_id()] = x;
    block_sync();
    x = shared[0];
#pragma unroll
    for (int w = 1; w < kTripletWarps; ++w) x = op(x, shared[w]);
    block_sync();
    return x;
}
template <typename T>
DML_DEVICE T fold_sum(T x) {
    return block_fold(x, [](T a, T b) { return a + b; });
}
template <typename T>
DML_DEVICE T fold_max(T x) {
    return block_fold(x, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
DML_DEVICE T fold_min(T x) {
    return block_fold(x, [](T a, T b) { return a < b ? a : b; });
}

// The sum of x over the threads before this one, and over all.
template <typename T>
DML_DEVICE T block_scan(T x, T& total) {
    static_assert(sizeof(T) <= sizeof(double));
    T* shared = reinterpret_cast<T*>(shared_array<double>(0, kTripletWarps));
    const int lane = lane_id();
    T inclusive = x;
#pragma unroll
    for (int m = 1; m < kWarpSize; m *= 2) {
        const T other = shfl(inclusive, lane >= m ? lane - m : lane);
        if (lane >= m) inclusive += other;
    }
    const T before = shfl(inclusive, lane > 0 ? lane - 1 : 0);
    if (lane == kWarpSize - 1) shared[warp_id()] = inclusive;
    block_sync();
    T sum = 0, base = 0;
#pragma unroll
    for (int w = 0; w < kTripletWarps; ++w) {
        if (w == warp_id()) base = sum;
        sum += shared[w];
    }
    block_sync();
    total = sum;
    return lane > 0 ? base + before : base;
}

// ---- a block's workspace ----------------------------------------------------------------------------------

inline int64_t power_of_two(int64_t x) {
    int64_t power = 1;
    while (power < x) power *= 2;
    return power;
}

template <typename T>
struct TripletWork {
    T* d;             // [space] distances of the chosen positives
    int32_t* column;  // [space] their columns
    double* prefix;   // [columns + 1] sums of the first so many distances, or weights of chosen negatives
    double* slope;    // [columns + 1] of the positives
    int32_t* step;    // [columns + 1] where runs begin and end, or chosen negatives

    static int64_t bytes(int64_t columns) {
        const int64_t each = power_of_two(columns) * int64_t(sizeof(T) + sizeof(int32_t)) +
                             (columns + 1) * int64_t(2 * sizeof(double) + sizeof(int32_t));
        return (each + 15) / 16 * 16;
    }
    static DML_DEVICE TripletWork at(void* memory, int64_t columns, int64_t space) {
        TripletWork work;
        work.prefix = static_cast<double*>(memory);
        work.slope = work.prefix + columns + 1;
        work.d = reinterpret_cast<T*>(work.slope + columns + 1);
        work.column = reinterpret_cast<int32_t*>(work.d + space);
        work.step = work.column + space;
        return work;
    }
};

// ---- a row ------------------------------------------------------------------------------------------------

template <typename T>
struct TripletRow {
    T* s;             // [columns]
    int64_t i;        // its index among all
    int64_t columns;  // that take part
    int64_t count;    // chosen positives
    int64_t negatives;
    TripletParams<T> params;
    TripletWork<T> work;

    // Gathers the positives, in the order of their columns; they, and negatives that are not allowed, become
    // NaN in the row.
    DML_DEVICE void load(const TripletStrip<T>& strip) {
        columns = rows_in_use(strip.ref_count, strip.columns);
        const int64_t own = strip.square ? i : strip.own ? strip.own[i] : -1;
        int64_t same = 0;
        count = 0;
        for (int64_t from = strip.begin[i]; from < strip.end[i]; from += kTripletThreads) {
            const int64_t k = from + threadIdx.x;
            const int64_t j = k < strip.end[i] ? strip.members[k] : columns;
            const bool exists = j < columns;
            const T distance = exists ? -s[j] : T(0);
            const bool keep = exists && j != own && params.positive_allowed(distance);
            int kept;
            const int64_t at = count + block_scan(keep ? 1 : 0, kept);
            if (keep) {
                work.d[at] = distance;
                work.column[at] = int32_t(j);
            }
            if (exists) s[j] = not_a_number<T>();
            count += kept;
            same += fold_sum(exists ? 1 : 0);
        }
        negatives = columns - same;
        block_sync();
        if (params.neg_low == -infinity<T>() && params.neg_high == infinity<T>()) return;
        int64_t allowed = 0;
        for (int64_t j = threadIdx.x; j < columns; j += kTripletThreads) {
            if (params.negative_allowed(-s[j])) {
                ++allowed;
            } else {
                s[j] = not_a_number<T>();
            }
        }
        negatives = fold_sum(allowed);
    }

    // The number of the farthest or nearest positive, the first among equals, or -1.
    DML_DEVICE int64_t extreme_positive(bool farthest) const {
        T best = -infinity<T>();
        int64_t at = count;
        for (int64_t k = threadIdx.x; k < count; k += kTripletThreads) {
            const T value = farthest ? work.d[k] : -work.d[k];
            if (value > best) {
                best = value;
                at = k;
            }
        }
        const T most = fold_max(best);
        at = fold_min(best == most ? at : count);
        return at < count ? at : -1;
    }
    DML_DEVICE void choose_positives(Selection which) {
        if (which == Selection::kAll || count == 0) return;
        const int64_t best = extreme_positive(which == Selection::kHardest);
        const T distance = work.d[best];
        const int32_t column = work.column[best];
        block_sync();
        if (threadIdx.x == 0) {
            work.d[0] = distance;
            work.column[0] = column;
        }
        count = 1;
        block_sync();
    }

    // The column of the largest similarity below the limit, or of the smallest, the first among equals; or
    // -1.
    DML_DEVICE int64_t extreme_negative(bool largest, T limit) const {
        T best = -infinity<T>();
        int64_t at = columns;
        for (int64_t j = threadIdx.x; j < columns; j += kTripletThreads) {
            const T value = largest ? s[j] : -s[j];
            if (value > best && (!largest || value < limit)) {
                best = value;
                at = j;
            }
        }
        const T most = fold_max(best);
        at = fold_min(best == most ? at : columns);
        return at < columns ? at : -1;
    }
};

// ---- draws by distance ------------------------------------------------------------------------------------

// Thread t looks after the t-th piece of the columns; below[t] is the weight of all pieces before.
template <typename T>
struct RowDraw {
    const TripletRow<T>& row;
    double* below;  // [kTripletThreads + 1], shared
    int64_t piece;
    T most;

    DML_DEVICE explicit RowDraw(const TripletRow<T>& of)
        : row(of),
          below(shared_array<double>(kFoldBytes, kTripletThreads + 1)),
          piece((of.columns + kTripletThreads - 1) / kTripletThreads) {
        T largest = -infinity<T>();
        for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) {
            const T log_weight = draw_log_weight(row.params, -row.s[j]);
            largest = log_weight > largest ? log_weight : largest;
        }
        most = fold_max(largest);
        double sum = 0, total;
        for (int64_t j = begin(threadIdx.x); j < begin(threadIdx.x + 1); ++j) sum += weight(j);
        below[threadIdx.x] = block_scan(sum, total);
        if (threadIdx.x == 0) below[kTripletThreads] = total;
        block_sync();
    }
    DML_DEVICE int64_t begin(int64_t t) const { return t * piece < row.columns ? t * piece : row.columns; }
    DML_DEVICE double weight(int64_t j) const {
        const T log_weight = draw_log_weight(row.params, -row.s[j]);
        return log_weight > -infinity<T>() ? double(exp_fast(log_weight - most)) : 0.0;
    }
    // By one thread. The column for a number in (0, 1), or -1 where all weights are 0.
    DML_DEVICE int64_t column(double u) const {
        const double total = below[kTripletThreads], target = u * total;
        if (!(total > 0)) return -1;
        int t = 0;  // the first piece that ends above the target
        for (int step = kTripletThreads / 2; step > 0; step /= 2) {
            if (!(below[t + step] > target)) t += step;
        }
        double sum = below[t];
        int64_t found = -1;
        for (int64_t j = begin(t); j < begin(t + 1); ++j) {
            const double here = weight(j);
            if (!(here > 0)) continue;
            found = j;
            sum += here;
            if (sum > target) break;
        }
        return found;
    }
};

// ---- the loss of a row ------------------------------------------------------------------------------------

template <typename T>
struct TripletTotals {
    double sum = 0, by_beta = 0;
    int64_t nonzero = 0, considered = 0;
};

// d similarity / d product of a similarity -d, or 1.
template <typename T>
DML_DEVICE T inverse_distance(bool euclidean, T d) {
    return !euclidean ? T(1) : d > T(0) ? T(1) / d : T(0);
}

// Every positive with every negative: first the positives' slopes, then, once these are known, `then(j,
// slope)` for each negative.
template <typename T, typename Term, typename Then>
DML_DEVICE void each_positive(TripletRow<T>& row, TripletTotals<T>& totals, const Then& then) {
    const TripletParams<T>& params = row.params;
    T sum = 0;
    for (int64_t k = 0; k < row.count; ++k) {
        const T d_pos = row.work.d[k];
        T slope = 0;
        for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) {
            const T d_neg = -row.s[j], violation = params.violation(d_pos, d_neg);
            if (!params.considered(d_pos, d_neg)) continue;
            ++totals.considered;
            if (!Term::counts(violation)) continue;
            sum += Term::value(violation);
            slope += Term::slope(violation);
            totals.nonzero += Term::nonzero(violation) ? 1 : 0;
        }
        const double all = fold_sum(double(slope));
        if (threadIdx.x == 0) row.work.slope[k] = all;
    }
    totals.sum += double(sum);
    for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) {
        const T d_neg = -row.s[j];
        T slope = 0;
        for (int64_t k = 0; k < row.count; ++k) {
            const T d_pos = row.work.d[k], violation = params.violation(d_pos, d_neg);
            const bool counts = params.considered(d_pos, d_neg) && Term::counts(violation);
            slope += counts ? Term::slope(violation) : T(0);
        }
        then(j, slope);
    }
}

// Bitonic, by distance and then column; what is past the end is +inf.
template <typename T>
DML_DEVICE void sort_positives(TripletRow<T>& row) {
    int64_t space = 1;
    while (space < row.count) space *= 2;
    T* d = row.work.d;
    int32_t* column = row.work.column;
    for (int64_t k = row.count + threadIdx.x; k < space; k += kTripletThreads) {
        d[k] = infinity<T>();
        column[k] = INT32_MAX;
    }
    block_sync();
    for (int64_t size = 2; size <= space; size *= 2) {
        for (int64_t stride = size / 2; stride > 0; stride /= 2) {
            for (int64_t pair = threadIdx.x; pair < space / 2; pair += kTripletThreads) {
                const int64_t a = 2 * pair - (pair & (stride - 1)), b = a + stride;
                const bool up = (a & size) == 0;
                const bool above = d[a] > d[b] || (d[a] == d[b] && column[a] > column[b]);
                if (above != up) continue;
                const T distance = d[a];
                const int32_t of = column[a];
                d[a] = d[b];
                column[a] = column[b];
                d[b] = distance;
                column[b] = of;
            }
            block_sync();
        }
    }
}

// The first positive of which `first` is true, or their number.
template <typename T, typename First>
DML_DEVICE int64_t search(const TripletRow<T>& row, T d_neg, const First& first) {
    int64_t low = 0, high = row.count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (first(row.params, row.work.d[middle], d_neg)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// Terms that are sums over runs of the sorted positives.
template <typename T, typename Term, typename Then>
DML_DEVICE void each_run(TripletRow<T>& row, TripletTotals<T>& totals, const Then& then) {
    constexpr bool kViolating = std::is_same_v<Term, HingeTerm<T>>;
    const TripletWork<T>& work = row.work;
    sort_positives(row);
    double before = 0;
    for (int64_t from = 0; from < row.count; from += kTripletThreads) {
        const int64_t k = from + threadIdx.x;
        double all;
        const double sum = before + block_scan(k < row.count ? double(work.d[k]) : 0.0, all);
        if (k < row.count) work.prefix[k] = sum;
        before += all;
    }
    if (threadIdx.x == 0) work.prefix[row.count] = before;
    for (int64_t k = threadIdx.x; k <= row.count; k += kTripletThreads) work.step[k] = 0;
    block_sync();
    for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) {
        const T d_neg = -row.s[j];
        int64_t begin = row.count, end = row.count;
        if (d_neg == d_neg) {
            begin = search(row, d_neg, FirstBelowGapHigh<T>());
            end = search(row, d_neg, FirstNotAboveGapLow<T>());
            end = end < begin ? begin : end;
            totals.considered += end - begin;
            if (kViolating) {
                const int64_t violating = search(row, d_neg, FirstViolating<T>());
                begin = violating > begin ? violating : begin;
                begin = begin < end ? begin : end;
            }
        }
        if (begin < end) {  // integers: any order gives the same sums
            atomic_add(work.step + begin, 1);
            atomic_add(work.step + end, -1);
            if (kViolating) {
                const double length = double(end - begin);
                totals.sum += work.prefix[end] - work.prefix[begin] +
                              length * (double(row.params.margin) - double(d_neg));
                totals.nonzero += end - begin;
            }
        }
        then(j, T(end - begin));
    }
    block_sync();
    int64_t inside = 0;
    for (int64_t from = 0; from < row.count; from += kTripletThreads) {
        const int64_t k = from + threadIdx.x;
        const int own = k < row.count ? work.step[k] : 0;
        int all;
        const int64_t sum = inside + block_scan(own, all) + own;
        if (k < row.count) work.slope[k] = double(sum);
        inside += all;
    }
}

template <typename T, typename Term, typename Then>
DML_DEVICE void all_terms(TripletRow<T>& row, TripletTotals<T>& totals, const Then& then) {
    if (Term::kSearchable && row.count > kFewTripletPositives) {
        each_run<T, Term>(row, totals, then);
    } else {
        each_positive<T, Term>(row, totals, then);
    }
    block_sync();
}

// All negatives of a row; the weights over its similarities.
template <typename T>
DML_DEVICE void all_negatives(TripletRow<T>& row, const TripletRules& rules, T beta,
                              TripletTotals<T>& totals) {
    const auto write = [&](int64_t j, T slope) {
        if (!rules.write) return;
        row.s[j] = slope != T(0) ? slope * inverse_distance(rules.euclidean, -row.s[j]) : T(0);
    };
    if (rules.term == TripletTerm::kHinge) {
        all_terms<T, HingeTerm<T>>(row, totals, write);
    } else if (rules.term == TripletTerm::kSoftplus) {
        all_terms<T, SoftplusTerm<T>>(row, totals, write);
    } else {
        const MarginTerms<T> terms{beta, row.params.margin};
        all_terms<T, CountedTerm<T>>(row, totals, [&](int64_t j, T uses) {
            const T term = uses > T(0) ? terms.negative(-row.s[j]) : T(0);
            if (term > T(0)) {
                totals.sum += double(uses) * double(term);
                totals.nonzero += int64_t(uses);
                totals.by_beta += double(uses);
            }
            write(j, term > T(0) ? uses : T(0));
        });
        for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) {
            const double uses = row.work.slope[k];
            const T term = terms.positive(row.work.d[k]);
            row.work.slope[k] = term > T(0) ? uses : 0.0;
            if (term > T(0)) {
                totals.sum += uses * double(term);
                totals.nonzero += int64_t(uses);
                totals.by_beta -= uses;
            }
        }
        block_sync();
    }
}

// Of each chosen positive's negative, its column, or -1, into work.step.
template <typename T>
DML_DEVICE void find_negatives(const TripletRow<T>& row, Selection which, uint64_t seed) {
    if (which == Selection::kDrawn) {
        const RowDraw<T> draw(row);
        for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads)
            row.work.step[k] = int32_t(draw.column(uniform_draw(seed, uint64_t(row.i), uint64_t(k))));
    } else if (which == Selection::kSemihard) {
        for (int64_t k = 0; k < row.count; ++k) {
            const int64_t j = row.extreme_negative(true, -row.work.d[k]);
            if (threadIdx.x == 0) row.work.step[k] = int32_t(j);
        }
    } else {
        const int64_t j = row.extreme_negative(which == Selection::kHardest, infinity<T>());
        for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) row.work.step[k] = int32_t(j);
    }
    block_sync();
}

// One negative for each chosen positive; the weights over the row's similarities.
template <typename T>
DML_DEVICE void selected_negatives(TripletRow<T>& row, const TripletRules& rules, T beta, uint64_t seed,
                                   TripletTotals<T>& totals) {
    const TripletWork<T>& work = row.work;
    const MarginTerms<T> margin{beta, row.params.margin};
    find_negatives(row, rules.negatives, seed);
    for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) {
        const int64_t j = work.step[k];
        const T d_pos = work.d[k], d_neg = j >= 0 ? -row.s[j] : T(0);
        T by_pos = 0, by_neg = 0;  // the term's derivatives by d_pos and by -d_neg
        if (j >= 0 && row.params.considered(d_pos, d_neg)) {
            ++totals.considered;
            if (rules.term == TripletTerm::kMargin) {
                const T of_pos = margin.positive(d_pos), of_neg = margin.negative(d_neg);
                by_pos = of_pos > T(0) ? T(1) : T(0);
                by_neg = of_neg > T(0) ? T(1) : T(0);
                totals.sum += double(of_pos) + double(of_neg);
                totals.nonzero += (of_pos > T(0) ? 1 : 0) + (of_neg > T(0) ? 1 : 0);
                totals.by_beta += double(by_neg) - double(by_pos);
            } else {
                const T violation = row.params.violation(d_pos, d_neg);
                const bool hinge = rules.term == TripletTerm::kHinge;
                if (!hinge || HingeTerm<T>::counts(violation)) {
                    totals.sum += double(hinge ? violation : SoftplusTerm<T>::value(violation));
                    totals.nonzero += hinge || SoftplusTerm<T>::nonzero(violation) ? 1 : 0;
                    by_pos = by_neg = hinge ? T(1) : SoftplusTerm<T>::slope(violation);
                }
            }
        }
        work.slope[k] = double(by_pos);
        work.prefix[k] = double(by_neg * inverse_distance(rules.euclidean, d_neg));
    }
    block_sync();
    if (!rules.write) return;
    for (int64_t j = threadIdx.x; j < row.columns; j += kTripletThreads) row.s[j] = T(0);
    block_sync();
    // A negative may be several positives': its column's thread adds them up.
    for (int64_t k = 0; k < row.count; ++k) {
        const int64_t j = work.step[k];
        if (j >= 0 && (j & (kTripletThreads - 1)) == threadIdx.x) row.s[j] += T(work.prefix[k]);
    }
}

template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    triplet_row_losses(TripletStrip<T> strip, TripletRules rules, const T* beta, T* sums, int64_t* counts,
                       T* grad_beta, unsigned char* workspace, int64_t space, int64_t work_bytes) {
    TripletRow<T> row;
    row.params = TripletParams<T>(rules.params);
    row.work = TripletWork<T>::at(workspace + blockIdx.x * work_bytes, strip.columns, space);
    for (int64_t r = blockIdx.x; r < strip.rows; r += gridDim.x) {
        row.s = strip.s + r * strip.pitch;
        row.i = strip.first + r;
        row.load(strip);
        row.choose_positives(rules.positives);
        TripletTotals<T> totals;
        const T of_beta = beta ? beta[row.i] : T(0);
        if (rules.negatives == Selection::kAll) {
            all_negatives(row, rules, of_beta, totals);
        } else {
            selected_negatives(row, rules, of_beta, rules.seed ? uint64_t(*rules.seed) : 0, totals);
        }
        if (rules.write) {
            for (int64_t k = threadIdx.x; k < row.count; k += kTripletThreads) {
                const T inverse = inverse_distance(rules.euclidean, row.work.d[k]);
                row.s[row.work.column[k]] = T(-row.work.slope[k]) * inverse;
            }
            for (int64_t j = row.columns + threadIdx.x; j < strip.columns; j += kTripletThreads)
                row.s[j] = T(0);
        }
        const double sum = fold_sum(totals.sum), by_beta = fold_sum(totals.by_beta);
        const int64_t nonzero = fold_sum(totals.nonzero), considered = fold_sum(totals.considered);
        if (threadIdx.x != 0) continue;
        sums[row.i] = T(sum);
        counts[2 * row.i] = nonzero;
        counts[2 * row.i + 1] = considered;
        if (grad_beta) grad_beta[row.i] = T(by_beta);
    }
}

// ---- select -----------------------------------------------------------------------------------------------

// The first of ascending numbers that is not below `value`.
DML_DEVICE int64_t lower_bound(const int64_t* numbers, int64_t count, int64_t value) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (numbers[middle] < value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    select_of_rows(TripletStrip<T> strip, TripletRules rules, SelectedPairs pairs, int64_t* columns,
                   T* similarities, unsigned char* workspace, int64_t space, int64_t work_bytes) {
    TripletRow<T> row;
    row.params = TripletParams<T>(rules.params);
    row.work = TripletWork<T>::at(workspace + blockIdx.x * work_bytes, strip.columns, space);
    const Selection which = rules.negatives;
    for (int64_t r = blockIdx.x; r < strip.rows; r += gridDim.x) {
        row.s = strip.s + r * strip.pitch;
        row.i = strip.first + r;
        const int64_t from = pairs.anchors ? lower_bound(pairs.anchors, pairs.count, row.i) : row.i;
        const int64_t to = pairs.anchors ? lower_bound(pairs.anchors, pairs.count, row.i + 1) : row.i + 1;
        // Of each pair, before the positives are taken out of the row. A pair has no similarity yet: that of
        // its positive waits in its place.
        for (int64_t k = from + threadIdx.x; k < to; k += kTripletThreads) {
            const int64_t j = pairs.anchors ? pairs.positives[k] : -1;
            columns[k] = j < 0 || j >= strip.columns ? -1 : j;
            similarities[k] = columns[k] < 0 ? -infinity<T>() : row.s[columns[k]];
        }
        block_sync();
        row.load(strip);
        if (pairs.of_positives) {
            const int64_t best = row.extreme_positive(which == Selection::kHardest);
            for (int64_t k = from + threadIdx.x; k < to; k += kTripletThreads) {
                columns[k] = best < 0 ? -1 : row.work.column[best];
                similarities[k] = best < 0 ? -infinity<T>() : -row.work.d[best];
            }
        } else if (which == Selection::kDrawn) {
            const RowDraw<T> draw(row);
            const uint64_t seed = uint64_t(*rules.seed);
            for (int64_t k = from + threadIdx.x; k < to; k += kTripletThreads) {
                const int64_t j = columns[k] < 0
                                      ? -1
                                      : draw.column(uniform_draw(seed, uint64_t(row.i), uint64_t(k - from)));
                columns[k] = j;
                similarities[k] = j < 0 ? -infinity<T>() : row.s[j];
            }
        } else {
            const bool each = which == Selection::kSemihard;
            const int64_t all = each ? -1 : row.extreme_negative(which == Selection::kHardest, infinity<T>());
            for (int64_t k = from; k < to; ++k) {
                const bool asks = !pairs.anchors || columns[k] >= 0;
                int64_t j = all;
                if (each) j = row.extreme_negative(true, asks ? similarities[k] : -infinity<T>());
                block_sync();  // all have read what is about to be replaced
                if (threadIdx.x != 0) continue;
                columns[k] = asks ? j : -1;
                similarities[k] = asks && j >= 0 ? row.s[j] : -infinity<T>();
            }
        }
        block_sync();
    }
}

// ---- distances --------------------------------------------------------------------------------------------

// A warp takes 32 columns of a row. Where the points are close the difference is summed up again, by all
// lanes.
template <typename T>
__global__ void __launch_bounds__(kTripletThreads, 2)
    distances_from_products(TripletStrip<T> strip, const T* x, const T* x_squares, const T* y,
                            const T* y_squares, int64_t dim) {
    const int64_t wide = (strip.columns + kWarpSize - 1) / kWarpSize;
    for (int64_t item = int64_t(blockIdx.x) * kTripletWarps + warp_id(); item < strip.rows * wide;
         item += int64_t(gridDim.x) * kTripletWarps) {
        const int64_t r = item / wide, first = item % wide * kWarpSize, j = first + lane_id();
        const bool exists = j < strip.columns;
        const T both = x_squares[r] + (exists ? y_squares[j] : T(0));
        T square = exists ? both - T(2) * strip.s[r * strip.pitch + j] : both;
        for (uint32_t near = warp_ballot(exists && square < kNearSquare<T> * both); near; near &= near - 1) {
            const int lane = __ffs(int(near)) - 1;
            const T *a = x + r * dim, *b = y + (first + lane) * dim;
            T sum = 0;
            for (int64_t d = lane_id(); d < dim; d += kWarpSize) sum += (a[d] - b[d]) * (a[d] - b[d]);
            sum = warp_sum(sum);
            if (lane == lane_id()) square = sum;
        }
        if (exists) strip.s[r * strip.pitch + j] = -std::sqrt(square > T(0) ? square : T(0));
    }
}

}  // namespace dml::cuda
