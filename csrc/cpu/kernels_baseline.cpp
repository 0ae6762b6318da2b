#include <cstdint>
#include <type_traits>

#include "../numeric.h"
#include "listed_kernels.h"
#include "product_kernels.h"
#include "tile_kernels.h"
#include "triplet_kernels.h"

#define DML_ISA baseline
#define DML_VECTOR_BYTES 16
#include "tile_kernels_impl.h"
#if !defined(DML_OWN_LAW)  // these use what the first defines, and no law
#include "listed_kernels_impl.h"
#include "product_kernels_impl.h"
#include "triplet_kernels_impl.h"
#endif
