// The CPU kernels for AVX-512.
#if defined(__x86_64__)
#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/numeric.h"
#include "cpu/kernels/center_kernels.h"
#include "cpu/kernels/listed_kernels.h"
#include "cpu/kernels/product_kernels.h"
#include "cpu/kernels/tile_kernels.h"
#include "cpu/kernels/triplet_kernels.h"

// After the includes: functions of those headers stay baseline, so that the linker cannot keep a copy with
// wider instructions for code that must run without them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define DML_ISA avx512
#define DML_VECTOR_BYTES 64
#include "cpu/kernels/tile_kernels_impl.h"
#if !defined(DML_CUSTOM_FORMULA)  // these do not depend on the formula; they use tile_kernels_impl.h
#include "cpu/kernels/listed_kernels_impl.h"
#include "cpu/kernels/product_kernels_impl.h"
#include "cpu/kernels/triplet_kernels_impl.h"
// After product_kernels_impl.h, whose transpose it uses.
#include "cpu/kernels/center_kernels_impl.h"
#endif

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
