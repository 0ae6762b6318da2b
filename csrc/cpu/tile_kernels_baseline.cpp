#include <cstdint>
#include <type_traits>

#include "exp.h"
#include "tile_kernels.h"


#define DML_ISA baseline
#include "tile_kernels_impl.h"
