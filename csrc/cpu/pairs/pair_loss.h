// The CPU engine: which tiles to visit, in which order and how often (forward.h, backward.h). The products of
// tiles are in product_kernels_impl.h, the loops over their pairs in tile_kernels_impl.h. Every number is
// made in one fixed order, whatever the number of threads.
#pragma once

#include "cpu/pairs/backward.h"
#include "cpu/pairs/forward.h"
