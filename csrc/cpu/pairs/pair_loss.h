// The CPU engine for pair losses. forward.h and backward.h decide which tiles are visited when; the products
// of tiles are in kernels/product_kernels_impl.h, the loops over their pairs in the files of
// kernels/tile_kernels_impl.h. Every sum has one fixed order, for any number of threads.
#pragma once

#include "cpu/pairs/backward.h"
#include "cpu/pairs/forward.h"
