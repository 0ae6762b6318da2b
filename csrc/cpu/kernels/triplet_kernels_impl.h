// The bodies of triplet_kernels.h. Included after tile_kernels_impl.h, whose Vector and distances they use.
#include "cpu/kernels/triplet_blocks_impl.h"
#include "cpu/kernels/triplet_columns_impl.h"
#include "cpu/kernels/triplet_terms_impl.h"
// After triplet_terms_impl.h, whose write_weights it uses.
#include "cpu/kernels/ranking_impl.h"

namespace dml::cpu::DML_ISA {

template <typename T>
const TripletKernels<T>& triplets() {
    static const TripletKernels<T> table = {
        distances<T>,
        keep_allowed<T>,
        {all_triplets<T, HingeTerm<T>>, all_triplets<T, SoftplusTerm<T>>, all_margin<T>},
        largest<T>,
        smallest<T>,
        rank_blocks<T>,
        far_factors<T>,
        add_ranks<T>,
        add_rank_weights<T>,
        add_shares<T>,
        share_weights<T>,
        write_row_weights<T>,
        draw_weights<T>,
        transpose<T>,
        add_transposed<T>,
        find_nonzeros<T>,
        add_nonzeros<T>,
        add_points<T>};
    return table;
}

template const TripletKernels<float>& triplets<float>();
template const TripletKernels<double>& triplets<double>();

}  // namespace dml::cpu::DML_ISA
