// The arguments that the ops on pairs share, each spelled here alone in C++: the tensors of a batch and the
// options, the text of their schemas, and the way from the flat argument list of an op to the two structs and
// back. dml_cuda/_ops/arguments.py holds the same fields in the same order.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace dml {

using OptionalTensor = std::optional<at::Tensor>;

struct PairBatch {
    const at::Tensor& embeddings;          // [N, D]
    const at::Tensor& labels;              // [N] int64
    const OptionalTensor& ref_emb;         // [M, D]
    const OptionalTensor& ref_labels;      // [M] int64
    const OptionalTensor& self_index;      // [N] int64, the row of ref_emb that is the same point, or -1
    const OptionalTensor& num_valid_refs;  // one int64: only so many of the first rows of ref_emb take part

    static constexpr char kSchema[] =
        "Tensor embeddings, Tensor labels, Tensor? ref_emb, Tensor? ref_labels, Tensor? self_index, "
        "Tensor? num_valid_refs";
    using Values = std::tuple<const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>;
    Values values() const { return {embeddings, labels, ref_emb, ref_labels, self_index, num_valid_refs}; }
};

struct PairOptions {
    std::string_view formula;  // a name of losses/list.h, or of a loaded formula
    at::ArrayRef<double> params;
    std::optional<double> epsilon;  // of mining; none: every pair counts
    std::string_view similarity;    // cosine | dot | euclidean | euclidean_raw (of rows as they come)
    std::string_view reduction;     // mean | mean_nonzero | mean_valid | sum | none
    bool mine_self_pair;            // whether mining sees the pair of a row with its self_index
    bool return_sums;  // the loss is [part 0, part 1, count 0, count 1], for the caller to divide
    bool
        both_directions;  // the rows of ref_emb have losses too, over the rows of embeddings: rows N to N + M
    std::string_view precision;  // how CUDA multiplies float32: ieee | tf32
    bool save_for_backward;      // whether a backward may follow
    int64_t cache_bytes;         // see kept_bytes
    // float64 on the CPU: params, then epsilon, in place of those above. A compiled graph reads it when it
    // runs, so other values do not compile another graph. With it `epsilon` only says whether there is
    // mining. On the GPU of the points, where parameters learn: params, then a number that does not count.
    OptionalTensor dynamic_params;

    // Similarities are kept for a backward that may follow; below 0: as many as the engine sees fit.
    static int64_t kept_bytes(bool save_for_backward, int64_t cache_bytes) {
        return save_for_backward ? cache_bytes : 0;
    }
    int64_t kept_bytes() const { return kept_bytes(save_for_backward, cache_bytes); }

    static constexpr char kSchema[] =
        "str formula, float[] params, float? epsilon, str similarity, str reduction, bool mine_self_pair, "
        "bool return_sums, bool both_directions, str precision, bool save_for_backward, "
        "int cache_bytes, Tensor? dynamic_params";
    using Values = std::tuple<c10::string_view, at::ArrayRef<double>, std::optional<double>, c10::string_view,
                              c10::string_view, bool, bool, bool, c10::string_view, bool, int64_t,
                              const OptionalTensor&>;
    Values values() const {
        return {formula,     params,          epsilon,   similarity,        reduction,   mine_self_pair,
                return_sums, both_directions, precision, save_for_backward, cache_bytes, dynamic_params};
    }
};

struct Call : PairBatch, PairOptions {
    // [N], or [N + M] with both_directions: factors of the rows' losses. Between batch and options in the ops.
    const OptionalTensor& row_weights;

    static constexpr char kRowWeightsSchema[] = "Tensor? row_weights";
};

// A copy of options that owns what they refer to; but not dynamic_params, which autograd keeps.
class OwnedOptions {
    template <typename T>
    static std::decay_t<T> own(const T& x) {
        return x;
    }
    static std::string own(std::string_view x) { return std::string(x); }
    static std::vector<double> own(at::ArrayRef<double> x) { return x.vec(); }
    template <typename... Values>
    static auto own_each(const std::tuple<Values...>&)
        -> std::tuple<decltype(own(std::declval<Values>()))...>;

   public:
    using Fields = decltype(own_each(std::declval<PairOptions::Values>()));

    explicit OwnedOptions(Fields fields) : fields_(std::move(fields)) {}
    explicit OwnedOptions(PairOptions from) {
        from.dynamic_params.reset();
        fields_ = std::apply([](const auto&... x) { return Fields(own(x)...); }, from.values());
    }

    const Fields& fields() const { return fields_; }
    PairOptions with(const OptionalTensor& dynamic_params) const {
        PairOptions options = std::apply([](const auto&... x) { return PairOptions{x...}; }, fields_);
        options.dynamic_params = dynamic_params;
        return options;
    }

   private:
    Fields fields_;
};

// ---- between an op's flat argument list and the structs ----------------------------------------------------

// FlatOp<f>::call takes the fields of a batch and of the options one by one, as the dispatcher calls an op,
// and hands them to f(const Call&, rest...), f(const PairBatch&, rest...) or f(const PairOptions&, rest...).
template <auto function, typename Signature = decltype(function), typename Batch = PairBatch::Values,
          typename Options = PairOptions::Values>
struct FlatOp;

template <auto function, typename Result, typename... Rest, typename... Batch, typename... Options>
struct FlatOp<function, Result (*)(const Call&, Rest...), std::tuple<Batch...>, std::tuple<Options...>> {
    static Result call(Batch... batch, const OptionalTensor& row_weights, Options... options, Rest... rest) {
        return function(Call{{batch...}, {options...}, row_weights}, rest...);
    }
};

template <auto function, typename Result, typename... Rest, typename... Batch, typename Options>
struct FlatOp<function, Result (*)(const PairBatch&, Rest...), std::tuple<Batch...>, Options> {
    static Result call(Batch... batch, Rest... rest) { return function({batch...}, rest...); }
};

template <auto function, typename Result, typename... Rest, typename Batch, typename... Options>
struct FlatOp<function, Result (*)(const PairOptions&, Rest...), Batch, std::tuple<Options...>> {
    static Result call(Options... options, Rest... rest) { return function({options...}, rest...); }
};

// The same for a function of options that pybind11 calls: numbers come as a vector.
template <typename T>
struct FromPython {
    using Type = T;
};
template <>
struct FromPython<at::ArrayRef<double>> {
    using Type = const std::vector<double>&;
};
template <auto function, typename Signature = decltype(function), typename Options = PairOptions::Values>
struct PythonOp;

template <auto function, typename Result, typename... Rest, typename... Options>
struct PythonOp<function, Result (*)(const PairOptions&, Rest...), std::tuple<Options...>> {
    static Result call(typename FromPython<Options>::Type... options, Rest... rest) {
        return function({options...}, rest...);
    }
};

// Calls an op, as found in the dispatcher, with a call and the op's other arguments.
template <typename Op, typename... Rest>
auto call_op(const Op& op, const Call& call, const Rest&... rest) {
    return std::apply(
        [&](const auto&... arguments) { return op.call(arguments..., rest...); },
        std::tuple_cat(call.PairBatch::values(), std::tuple<const OptionalTensor&>(call.row_weights),
                       call.PairOptions::values()));
}

}  // namespace dml
