// The CPU kernels for the baseline instruction set.
#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/numeric.h"
#include "cpu/kernels/center_kernels.h"
#include "cpu/kernels/listed_kernels.h"
#include "cpu/kernels/product_kernels.h"
#include "cpu/kernels/tile_kernels.h"
#include "cpu/kernels/triplet_kernels.h"

#define DML_ISA baseline
#define DML_VECTOR_BYTES 16
#include "cpu/kernels/tile_kernels_impl.h"
#if !defined(DML_CUSTOM_FORMULA)  // these do not depend on the formula; they use tile_kernels_impl.h
#include "cpu/kernels/listed_kernels_impl.h"
#include "cpu/kernels/product_kernels_impl.h"
#include "cpu/kernels/triplet_kernels_impl.h"
// After product_kernels_impl.h, whose transpose it uses.
#include "cpu/kernels/center_kernels_impl.h"
#endif
