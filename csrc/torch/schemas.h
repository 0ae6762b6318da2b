// The schemas of the ops that every device implements. All ops are functional. What a forward pass leaves for
// its backward pass is one tensor of bytes, laid out by each device's engine for itself.
#pragma once

#include <string>

#include "torch/arguments.h"

namespace dml::schemas {

inline std::string with_options(const std::string& name, const std::string& rest) {
    return name + "(" + PairOptions::kSchema + rest;
}
inline std::string with_batch(const std::string& name, const std::string& rest) {
    return name + "(" + PairBatch::kSchema + ", " + Call::kRowWeightsSchema + ", " + PairOptions::kSchema +
           rest;
}

// The loss of a batch, and its gradient. Absent gradients are [0]; grad_params is that of dynamic_params.
inline std::string pair_loss() { return with_batch("pair_loss", ") -> (Tensor loss, Tensor saved)"); }
inline std::string pair_loss_backward() {
    return with_batch("pair_loss_backward",
                      ", Tensor grad_loss, Tensor saved, bool need_emb, bool need_ref, bool need_params) -> "
                      "(Tensor grad_emb, Tensor grad_ref, Tensor grad_params)");
}

// The same for a ring of processes: one block of columns a call, as ref_emb, in which self_index names each
// row's own column. The rows' running numbers go from call to call in a state, in a layout of each device's
// own.
//   pair_block_turn      makes the state (stage "start"), or turns it to the next stage
//   pair_block           adds a block in a stage, and returns which of its tiles may have a gradient
//   pair_block_rows      losses [4, N]: the rows' parts 0 and 1 and their counts; weights: for backward
//   pair_block_backward  the gradients by the rows, by one block, and by dynamic_params: of the block's terms,
//                        and, with by_rows, of what the rows' losses make of them
inline std::string pair_block_turn() {
    return with_options("pair_block_turn",
                        ", Tensor? state, Tensor pairs, str stage, bool is_double) -> Tensor state");
}
inline std::string pair_block() {
    return with_batch("pair_block",
                      ", Tensor state, str stage, Tensor? found=None) -> (Tensor state, Tensor found)");
}
inline std::string pair_block_rows() {
    return with_options("pair_block_rows",
                        ", Tensor state, Tensor pairs) -> (Tensor losses, Tensor weights)");
}
inline std::string pair_block_backward() {
    return with_batch("pair_block_backward",
                      ", Tensor grad_parts, Tensor weights, Tensor kept, bool need_emb, bool need_ref, "
                      "bool need_params, bool by_rows) -> "
                      "(Tensor grad_emb, Tensor grad_ref, Tensor grad_params)");
}

// How many positives and negatives mining keeps of each row, counts [2, N] int64: on CUDA alone, as others go
// another way (dml_cuda/miners/mined_pairs.py).
inline std::string count_pairs() {
    return std::string("count_pairs(") + PairBatch::kSchema +
           ", float? epsilon, str similarity) -> Tensor counts";
}

// Triplets of an anchor with a positive and a negative, without listing them.
//   row_params [N] the rows' beta of the term margin; of the others their margin, instead of that of params
//   seed       int64 [1], of a draw
//   term       hinge | softplus | margin
//   positives  all | hardest | easiest
//   negatives  all | hardest | easiest | semihard | drawn
//   params     margin, gap_low, gap_high, pos_low, pos_high, neg_low, neg_high, cutoff, nonzero_cutoff, dim
//              (core/triplets.h)
//   sums       [N] a row's terms, summed; counts [N, 2] its terms that are not 0, its triplets
//   grad_*     the gradient of sums.sum(), in the type of sums; [0] where not saved or absent
inline std::string triplet_loss() {
    return std::string("triplet_loss(") + PairBatch::kSchema +
           ", Tensor? row_params, Tensor? seed, str term, str positives, str negatives, float[] params, "
           "str similarity, bool save, bool save_ref=True) -> "
           "(Tensor sums, Tensor counts, Tensor grad_emb, Tensor grad_ref, Tensor grad_row_params)";
}
// Losses of the ranks, or of a histogram, of each row's similarities.
//   loss           smooth_ap | recall_at_k | fast_ap
//   params         temperature | temperature, temperature_k, the cut-offs K | bins; or these in float64 on the
//                  CPU as dynamic_params, in which case params is empty
//   losses         [N] of the rows, weighted; counts [N, 2] whether it is not 0, whether the row has a positive
//   grad_*         the gradient of losses.sum(), in the type of losses, grad_params in float64; [0] where not
//                  saved or absent
inline std::string ranking_loss() {
    return std::string("ranking_loss(") + PairBatch::kSchema + ", " + Call::kRowWeightsSchema +
           ", Tensor? dynamic_params, str loss, float[] params, str similarity, bool save, "
           "bool save_ref=True, bool save_params=False) -> "
           "(Tensor losses, Tensor counts, Tensor grad_emb, Tensor grad_ref, Tensor grad_params)";
}
// The column, and its similarity, that a rule finds for each row, or for each pair of anchors (ascending) and
// positives (-1: none). The rules: hardest_ or easiest_positive, hardest_, easiest_, semihard_ or
// drawn_negative. -1 and -inf where there is none.
inline std::string select() {
    return std::string("select(") + PairBatch::kSchema +
           ", Tensor? seed, str rule, float[] params, Tensor? anchors, Tensor? positives, str similarity) -> "
           "(Tensor column, Tensor similarity)";
}

// Cross entropy of classes with several centres (core/centers.h).
//   centers   [C K, D], the K centres of a class together; labels [N], others than 0 to C - 1 for no loss
//   loss      soft_triple: la, gamma, margin | sub_centers: scale, and the cosine and sine of the angle
//   learned   the params in float64 on the device, in which case params is empty
//   block     how many products of rows and centres are in memory at once
//   losses    [N], float64 of float64, else float32; saved [3, N] is for backward
//   grad_*    [0] where not needed
inline constexpr const char* kCenterArguments = "SymInt per_class, str loss, float[] params, int block";
inline std::string center_softmax() {
    return std::string("center_softmax(Tensor embeddings, Tensor centers, Tensor labels, Tensor? learned, ") +
           kCenterArguments + ") -> (Tensor losses, Tensor saved)";
}
inline std::string center_softmax_backward() {
    return std::string(
               "center_softmax_backward(Tensor grad_losses, Tensor embeddings, Tensor centers, "
               "Tensor labels, Tensor? learned, Tensor saved, ") +
           kCenterArguments +
           ", bool need_emb, bool need_centers, bool need_params) -> "
           "(Tensor grad_emb, Tensor grad_centers, Tensor grad_params)";
}

}  // namespace dml::schemas
