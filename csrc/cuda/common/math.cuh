// The product of two tiles in shared memory, by a thread block. Each arithmetic is one small struct
// (SimtMath, HalfMath, Tf32Math) behind the same interface:
//
//   Product<Math, Shape>    the accumulators of C [Shape::kRows, Shape::kCols], spread over the block
//     .add<depth>(a, b, f)    C += A B^T, A [kRows, depth], B [kCols, depth]; f() after the first loads
//     .for_each(f)            f(row, col, value) for the elements of this thread
//     .for_each_run(f)        f(row, col, values) for kRun neighbours at a time
#pragma once

#include <type_traits>

#include "cuda/common/primitives.cuh"

namespace dml::cuda {

// Views of shared memory as elements (i, k); k is summed over.
template <typename T, int Pitch>
struct AlongK {  // rows run along k
    using Value = T;
    static constexpr bool kAlongK = true;
    const T* data;
    DML_DEVICE const T* at(int i, int k) const { return data + i * Pitch + k; }
};
template <typename T, int Pitch>
struct AcrossK {  // one row for each k
    using Value = T;
    static constexpr bool kAlongK = false;
    const T* data;
    DML_DEVICE const T* at(int i, int k) const { return data + k * Pitch + i; }
};

// The tile of a block, and how its warps share it. Across: B's rows run across k.
template <int Rows, int Cols, int WarpRows, int WarpCols, bool Across>
struct Shape {
    static constexpr int kRows = Rows, kCols = Cols;
    static constexpr int kWarpRows = WarpRows, kWarpCols = WarpCols;
    static constexpr int kThreads = WarpRows * WarpCols * kWarpSize;
    static constexpr bool kAcross = Across;
};

// ---- plain multiply-adds ----------------------------------------------------------------------------

template <typename T>
struct SimtMath {
    using Value = T;
    using Acc = T;
    static constexpr bool kTensorCores = false;
};

// ---- tensor cores: each struct loads fragments (primitives.cuh shows their layout) and multiplies -----
//
// load(b, view, col, k) fills the fragments of Tiles neighbouring tiles of 8 columns; at_once() says how
// many. Where kInterleaves and rows run across k, tile j has the columns Tiles g + j: a lane then reads its
// numbers for all tiles as one vector, and holds neighbours of a row of the result.

// A float that was rounded to tf32 when it was stored.
struct RoundedToTf32 {
    float value;
    RoundedToTf32() = default;
    // Not in an initialiser list, which nvcc hands to the host's compiler too.
    explicit DML_DEVICE RoundedToTf32(float x) { value = x == x ? __uint_as_float(to_tf32(x)) : x; }
    explicit DML_DEVICE operator float() const { return value; }
};

template <typename T, int Count>
struct alignas(Count * sizeof(T)) Vector {
    T value[Count];
};

// float16 and bfloat16 as they are.
template <typename T>
struct HalfMath {
    using Value = T;
    using Acc = float;
    static constexpr bool kTensorCores = true, kInterleaves = false, kStepByStep = false;
    static constexpr int kDepth = kMmaK<T>;
    struct A {
        uint32_t r[4];
    };
    struct B {
        uint32_t r[2];
    };
    static constexpr int at_once(int tiles, bool /*across*/) { return tiles % 2 == 0 ? 2 : 1; }

    template <typename View>
    static DML_DEVICE void load(A& a, const View& view, int row, int k) {
        const int lane = lane_id();
        static_assert(sizeof(typename View::Value) == 2, "ldmatrix moves 16-bit elements");
        if constexpr (View::kAlongK) {
            ldmatrix_x4(a.r, view.at(row + lane % 16, k + 8 * (lane / 16)));
        } else {
            ldmatrix_x4_trans(a.r, view.at(row + 8 * (lane / 8 % 2), k + lane % 8 + 8 * (lane / 16)));
        }
    }
    template <int Tiles, typename View>
    static DML_DEVICE void load(B (&b)[Tiles], const View& view, int col, int k) {
        const int lane = lane_id();
        if constexpr (Tiles == 2) {
            uint32_t both[4];
            if constexpr (View::kAlongK) {
                ldmatrix_x4(both, view.at(col + lane % 8 + 8 * (lane / 16), k + 8 * (lane / 8 % 2)));
            } else {
                ldmatrix_x4_trans(both, view.at(col + 8 * (lane / 16), k + lane % 16));
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) b[i / 2].r[i % 2] = both[i];
        } else if constexpr (View::kAlongK) {
            ldmatrix_x2(b[0].r, view.at(col + lane % 8, k + 8 * (lane / 8 % 2)));
        } else {
            ldmatrix_x2_trans(b[0].r, view.at(col, k + lane % 16));
        }
    }
    static DML_DEVICE void multiply(float (&acc)[4], const A& a, const B& b) { mma<T>(acc, a.r, b.r); }
};

// Floats (or float16, which tf32 holds exactly, with an exponent to spare) on tf32 units. With Split each
// operand is the sum of two tf32 numbers and the product the sum of three: as accurate as float32.
template <typename T, bool Split>
struct Tf32Math {
    using Value = T;
    using Acc = float;
    static constexpr bool kTensorCores = true, kInterleaves = true, kStepByStep = false;
    // Tensor cores truncate their sums. For float32 accuracy every kSteps steps start at 0 and join the sum
    // by an ordinary addition, which rounds.
    static constexpr int kSteps = Split ? 2 : 1;
    static constexpr int kDepth = kSteps * kMmaK<Tf32>;
    template <int Registers>
    struct Fragment {
        uint32_t big[kSteps][Registers], small[kSteps][Split ? Registers : 1];
    };
    using A = Fragment<4>;
    using B = Fragment<2>;
    static constexpr int at_once(int tiles, bool across) {
        const int even = tiles % 2 == 0 ? 2 : 1;
        return Split ? (across ? even : 1) : across && tiles % 4 == 0 ? 4 : even;
    }

    template <int Registers, typename X>
    static DML_DEVICE void set(Fragment<Registers>& f, int step, int i, X x) {
        if constexpr (Split) {
            split_tf32(x, f.big[step][i], f.small[step][i]);
        } else if constexpr (std::is_same_v<X, float>) {
            f.big[step][i] = to_tf32(x);
        } else {  // is a tf32 number
            f.big[step][i] = __float_as_uint(float(x));
        }
    }
    template <typename X>
    static DML_DEVICE X as(uint32_t bits) {
        return reinterpret_cast<const X&>(bits);
    }

    // A: floats, or numbers that were rounded when they were stored.
    template <typename View>
    static DML_DEVICE void load(A& a, const View& view, int row, int k) {
        using X = typename View::Value;
#pragma unroll
        for (int step = 0; step < kSteps; ++step, k += kMmaK<Tf32>) {
            if constexpr (View::kAlongK) {
                uint32_t x[4];
                ldmatrix_x4(x, view.at(row + lane_id() % 16, k + 4 * (lane_id() / 16)));
#pragma unroll
                for (int i = 0; i < 4; ++i) set(a, step, i, as<X>(x[i]));
            } else {
                const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    set(a, step, i, *view.at(row + g + 8 * (i & 1), k + t + 4 * (i / 2)));
            }
        }
    }
    template <int Tiles, typename View>
    static DML_DEVICE void load(B (&b)[Tiles], const View& view, int col, int k) {
        const int lane = lane_id(), g = lane / 4, t = lane % 4;
        if constexpr (!View::kAlongK) {
#pragma unroll
            for (int i = 0; i < 2 * kSteps; ++i) {
                const auto x =
                    *reinterpret_cast<const Vector<T, Tiles>*>(view.at(col + Tiles * g, k + t + 4 * i));
#pragma unroll
                for (int j = 0; j < Tiles; ++j) set(b[j], i / 2, i % 2, x.value[j]);
            }
        } else if constexpr (Tiles * kSteps == 2) {  // two tiles, or two steps of one
            constexpr int kCol = Split ? 0 : 8, kDown = Split ? 8 : 0;
            uint32_t x[4];
            ldmatrix_x4(x, view.at(col + lane % 8 + kCol * (lane / 16),
                                   k + 4 * (lane / 8 % 2) + kDown * (lane / 16)));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                set(b[Split ? 0 : i / 2], Split ? i / 2 : 0, i % 2, __uint_as_float(x[i]));
        } else {
            uint32_t x[2];
            ldmatrix_x2(x, view.at(col + lane % 8, k + 4 * (lane / 8 % 2)));
#pragma unroll
            for (int i = 0; i < 2; ++i) set(b[0], 0, i, __uint_as_float(x[i]));
        }
    }
    // Small products first.
    static DML_DEVICE void multiply(float (&acc)[4], const A& a, const B& b) {
        if constexpr (!Split) {
            mma<Tf32>(acc, a.big[0], b.big[0]);
        } else {
            float step[4];
            mma_from_zero<Tf32>(step, a.small[0], b.big[0]);
            mma<Tf32>(step, a.small[1], b.big[1]);
            mma<Tf32>(step, a.big[0], b.small[0]);
            mma<Tf32>(step, a.big[1], b.small[1]);
            mma<Tf32>(step, a.big[0], b.big[0]);
            mma<Tf32>(step, a.big[1], b.big[1]);
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[e] += step[e];
        }
    }
};

// ---- float16 parts of scaled floats ---------------------------------------------------------------------
//
// Rows are powers of two times x = big + small / 2048, both float16 (images.cuh). With two parts the product is big big +
// (big small + small big) / 2048, as accurate as float32; with one it is big big, as accurate as tf32.

template <int kParts>
struct ScaledMath;

template <>
struct ScaledMath<1> : HalfMath<__half> {
    using Value = float;
};

template <>
struct ScaledMath<2> {
    using Value = float;
    using Acc = float;
    using Half = HalfMath<__half>;
    static constexpr bool kTensorCores = true, kInterleaves = false, kStepByStep = false;
    // Tensor cores truncate their sums: every kSteps steps start at 0 and join the sum by an addition, which rounds.
    static constexpr int kSteps = 2, kDepth = kSteps * Half::kDepth;
    struct A {
        Half::A big[kSteps], small[kSteps];
    };
    struct B {
        uint32_t big[kSteps][2], small[kSteps][2];
    };
    static constexpr int at_once(int /*tiles*/, bool /*across*/) { return 1; }

    template <typename View>
    static DML_DEVICE void load(A& a, const View& view, int row, int k) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            Half::load(a.big[step], view, row, k + step * Half::kDepth);
            Half::load(a.small[step], view.part(1), row, k + step * Half::kDepth);
        }
    }
    template <typename View>
    static DML_DEVICE void load(B (&b)[1], const View& view, int col, int k) {
        const auto load_part = [&](const View& part, uint32_t (&to)[kSteps][2]) {
            uint32_t x[4];
            ldmatrix_x4(x, part.at(col + lane_id() % 8, k + 8 * (lane_id() / 8)));
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i / 2][i % 2] = x[i];
        };
        load_part(view, b[0].big);
        load_part(view.part(1), b[0].small);
    }
    static DML_DEVICE void multiply(float (&acc)[4], const A& a, const B& b) {
        float step[4];
        mma_from_zero<__half>(step, a.small[0].r, b.big[0]);
        mma<__half>(step, a.small[1].r, b.big[1]);
        mma<__half>(step, a.big[0].r, b.small[0]);
        mma<__half>(step, a.big[1].r, b.small[1]);
#pragma unroll
        for (float& x : step) x *= kSmallScale;
        mma<__half>(step, a.big[0].r, b.big[0]);
        mma<__half>(step, a.big[1].r, b.big[1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[e] += step[e];
    }
};

// Weights in shared memory: parts of floats (images.cuh), and for each row the power of two by which it is that of the
// weights.
template <typename View>
struct ScaledRows {
    View parts;
    const float* scales;  // [rows]
};

// Such weights times the rows of an image: each step of a product starts at 0 and joins its sum at the scale of its row.
template <typename ValueType, int kParts>
struct WeightMath {
    using Value = ValueType;
    using Acc = float;
    using Half = HalfMath<__half>;
    static constexpr bool kTensorCores = true, kInterleaves = false, kStepByStep = kParts == 1;
    static constexpr int kDepth = Half::kDepth;
    struct A {
        Half::A big, small;
        float scale[2];
    };
    struct B {
        Half::B big, small;
    };
    static constexpr int at_once(int tiles, bool across) { return Half::at_once(tiles, across); }

    template <typename View>
    static DML_DEVICE void load(A& a, const ScaledRows<View>& view, int row, int k) {
        Half::load(a.big, view.parts, row, k);
        if constexpr (kParts == 2) Half::load(a.small, view.parts.part(1), row, k);
#pragma unroll
        for (int half = 0; half < 2; ++half) a.scale[half] = view.scales[row + lane_id() / 4 + 8 * half];
    }
    template <int Tiles, typename View>
    static DML_DEVICE void load(B (&b)[Tiles], const View& view, int col, int k) {
        Half::B part[Tiles];
        Half::load(part, view, col, k);
#pragma unroll
        for (int i = 0; i < Tiles; ++i) b[i].big = part[i];
        if constexpr (kParts == 2) {
            Half::load(part, view.part(1), col, k);
#pragma unroll
            for (int i = 0; i < Tiles; ++i) b[i].small = part[i];
        }
    }
    static DML_DEVICE void multiply(float (&acc)[4], const A& a, const B& b) {
        float step[4];
        if constexpr (kParts == 2) {
            mma_from_zero<__half>(step, a.small.r, b.big.r);
            mma<__half>(step, a.big.r, b.small.r);
#pragma unroll
            for (float& x : step) x *= kSmallScale;
            mma<__half>(step, a.big.r, b.big.r);
        } else {
            mma_from_zero<__half>(step, a.big.r, b.big.r);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[e] = std::fma(step[e], a.scale[e / 2], acc[e]);
    }
};

// ---- the product ------------------------------------------------------------------------------------

template <typename Math, typename Shape, bool TensorCores = Math::kTensorCores>
struct Product;

template <typename Math, typename Shape>
struct Product<Math, Shape, true> {
    static constexpr int kRowTiles = Shape::kRows / Shape::kWarpRows / 16;
    static constexpr int kColTiles = Shape::kCols / Shape::kWarpCols / 8;
    static_assert(kRowTiles * 16 * Shape::kWarpRows == Shape::kRows, "a warp's rows come in 16s");
    static_assert(kColTiles * 8 * Shape::kWarpCols == Shape::kCols, "a warp's columns come in 8s");
    static constexpr int kAtOnce = Math::at_once(kColTiles, Shape::kAcross);
    static constexpr bool kInterleaved = Math::kInterleaves && Shape::kAcross;
    static constexpr int kRunTiles = kInterleaved ? kAtOnce : 1;
    static constexpr int kRun = 2 * kRunTiles;  // neighbours that a lane holds

    float acc[kRowTiles][kColTiles][4] = {};

    static DML_DEVICE int row0() { return warp_id() / Shape::kWarpCols * kRowTiles * 16; }
    static DML_DEVICE int col0() { return warp_id() % Shape::kWarpCols * kColTiles * 8; }

    // Calls between() after the first fragments are loaded, or before where they leave no registers for it.
    template <int Depth, typename ViewA, typename ViewB, typename F>
    DML_DEVICE void add(const ViewA& view_a, const ViewB& view_b, const F& between) {
        static_assert(Depth % Math::kDepth == 0, "whole steps only");
        static_assert(ViewB::kAlongK != Shape::kAcross, "as the shape says");
        constexpr int kStepsAtOnce = Math::kStepByStep ? 1 : Depth / Math::kDepth;
        if constexpr (Math::kStepByStep) between();
#pragma unroll kStepsAtOnce
        for (int k = 0; k < Depth; k += Math::kDepth) {
            typename Math::A a[kRowTiles];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) Math::load(a[i], view_a, row0() + 16 * i, k);
#pragma unroll
            for (int j = 0; j < kColTiles; j += kAtOnce) {
                typename Math::B b[kAtOnce];
                Math::load(b, view_b, col0() + 8 * j, k);
                if (!Math::kStepByStep && k == 0 && j == 0) between();
#pragma unroll
                for (int n = 0; n < kAtOnce; ++n) {
#pragma unroll
                    for (int i = 0; i < kRowTiles; ++i) {
                        Math::multiply(acc[i][j + n], a[i], b[n]);
                    }
                }
            }
        }
    }

    // Calls f(row, col, values) for each run of kRun neighbours in a row.
    template <typename F>
    DML_DEVICE void for_each_run(const F& f) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int j = 0; j < kColTiles; j += kRunTiles) {
                    float values[kRun];
#pragma unroll
                    for (int c = 0; c < kRun; ++c)
                        values[c] = acc[i][j + c % kRunTiles][2 * half + c / kRunTiles];
                    f(row0() + 16 * i + g + 8 * half, col0() + 8 * j + kRun * t, values);
                }
            }
        }
    }
    template <typename F>
    DML_DEVICE void for_each(const F& f) const {
        for_each_run([&](int row, int col, const float (&values)[kRun]) {
#pragma unroll
            for (int c = 0; c < kRun; ++c) f(row, col + c, values[c]);
        });
    }
};

template <typename Math, typename Shape>
struct Product<Math, Shape, false> {
    using T = typename Math::Acc;
    static constexpr int kVector = 16 / int(sizeof(T));                     // elements along k read at once
    static constexpr int kAcross = Shape::kRows >= Shape::kCols ? 16 : 32;  // threads along a row of C
    static constexpr int kDown = Shape::kThreads / kAcross;
    static constexpr int kThreadRows = Shape::kRows / kDown, kThreadCols = Shape::kCols / kAcross;
    static_assert(kThreadRows * kDown == Shape::kRows && kThreadCols * kAcross == Shape::kCols,
                  "even shares");

    static constexpr int kRun = 1;

    T acc[kThreadRows][kThreadCols] = {};

    template <typename View>
    static DML_DEVICE void load(T (&x)[kVector], const View& view, int i, int k) {
        if constexpr (View::kAlongK) {
            const auto v = *reinterpret_cast<const Vector<T, kVector>*>(view.at(i, k));
#pragma unroll
            for (int e = 0; e < kVector; ++e) x[e] = v.value[e];
        } else {
#pragma unroll
            for (int e = 0; e < kVector; ++e) x[e] = *view.at(i, k + e);
        }
    }

    template <int Depth, typename ViewA, typename ViewB, typename F>
    DML_DEVICE void add(const ViewA& view_a, const ViewB& view_b, const F& between) {
        between();
        const int down = int(threadIdx.x) / kAcross, across = int(threadIdx.x) % kAcross;
#pragma unroll 2
        for (int k = 0; k < Depth; k += kVector) {
            T a[kThreadRows][kVector], b[kThreadCols][kVector];
#pragma unroll
            for (int i = 0; i < kThreadRows; ++i) load(a[i], view_a, down + i * kDown, k);
#pragma unroll
            for (int j = 0; j < kThreadCols; ++j) load(b[j], view_b, across + j * kAcross, k);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
#pragma unroll
                for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
                    for (int j = 0; j < kThreadCols; ++j) acc[i][j] = std::fma(a[i][e], b[j][e], acc[i][j]);
                }
            }
        }
    }

    template <typename F>
    DML_DEVICE void for_each(const F& f) const {
        const int down = int(threadIdx.x) / kAcross, across = int(threadIdx.x) % kAcross;
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
            for (int j = 0; j < kThreadCols; ++j) f(down + i * kDown, across + j * kAcross, acc[i][j]);
        }
    }
    template <typename F>
    DML_DEVICE void for_each_run(const F& f) const {
        for_each([&](int row, int col, T value) {
            const T values[1] = {value};
            f(row, col, values);
        });
    }
};

}  // namespace dml::cuda
