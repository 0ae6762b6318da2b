// The sizes that torch.compile asks for before anything runs, from the layouts that the engines use
// themselves, and the stages of a ring. Rows and columns may be symbolic. `itemsize` is that of the type that
// is computed in.
#include "torch/sizes.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/pairs/layout.h"
#include "cpu/pairs/ring.h"
#include "cuda/pairs/saved_sizes.h"

namespace dml {
namespace {

using c10::SymInt;

bool is_cuda(const std::string& device) { return device == "cuda"; }

SymInt saved_bytes(const std::string& device, const SymInt& n, const SymInt& m, bool square,
                   bool both_directions, int64_t itemsize, bool save_for_backward, int64_t cache_bytes,
                   int64_t device_params) {
    cache_bytes = PairOptions::kept_bytes(save_for_backward, cache_bytes);
    if (is_cuda(device))
        return cuda::saved_bytes_of<SymInt>(n, m, square, itemsize,
                                            cache_bytes < 0 ? cuda::kCacheBytes : cache_bytes, device_params);
    return cpu::Layout<SymInt>({n, m, square, both_directions}, itemsize, cache_bytes).bytes;
}

std::vector<SymInt> ring_state_shape(const std::string& device, const SymInt& n) {
    if (is_cuda(device)) return {cuda::state_numbers(n)};
    return {SymInt(cpu::kStateNumbers), n};
}

std::vector<SymInt> ring_weights_shape(const std::string& device, const SymInt& n) {
    if (is_cuda(device)) return {cuda::state_numbers(n)};
    return {SymInt(cpu::kStatsPerRow), n};
}

// What the stage "hardest" finds in a block, and the kept flags that the others find.
std::pair<SymInt, SymInt> ring_found_bytes(const std::string& device, const SymInt& n, const SymInt& m,
                                           int64_t itemsize) {
    if (is_cuda(device)) {
        const SymInt tiles = cuda::tile_count_of(n, m, false, itemsize);
        return {cuda::extremes_bytes(tiles, itemsize), tiles * cuda::knows_kept(tiles)};
    }
    const SymInt tiles = cpu::tile_count_of(n, m, false);
    return {tiles, tiles};
}

// As cuda/ring/ring.h has them: one pass finds the hardest pairs of both kinds.
std::vector<std::string> ring_stages(const std::string& device, const std::string& formula, bool mining) {
    if (!is_cuda(device)) return cpu::stages(formula, mining);
    std::vector<std::string> stages = cpu::stages(formula, false);
    if (mining) stages.insert(stages.begin(), "hardest");
    return stages;
}

}  // namespace

void def_sizes(pybind11::module_& m) {
    using pybind11::arg;
    m.def("saved_bytes", &saved_bytes, "Bytes that pair_loss leaves for its backward.", arg("device"),
          arg("n"), arg("m"), arg("square"), arg("both_directions"), arg("itemsize"),
          arg("save_for_backward"), arg("cache_bytes"), arg("device_params") = 0);
    m.def("ring_stages", &ring_stages,
          "The stages in which a formula's rows meet all blocks of columns, in order.", arg("device"),
          arg("formula"), arg("mining"));
    m.def("ring_state_shape", &ring_state_shape, "Shape of the state of pair_block.", arg("device"),
          arg("n"));
    m.def("ring_weights_shape", &ring_weights_shape, "Shape of the weights of pair_block_rows.",
          arg("device"), arg("n"));
    m.def("ring_found_bytes", &ring_found_bytes,
          "Bytes that pair_block finds in a block: in the stage \"hardest\", and in the others.",
          arg("device"), arg("n"), arg("m"), arg("itemsize"));
}

}  // namespace dml
