// How a block multiplies two tiles that lie in shared memory. Each kind of arithmetic is one small struct
// (SimtMath, HalfMath, Tf32Math, Bf16Math), all behind the same two names:
//
//   Product<Math, Shape>   the accumulators of C [Shape::kRows, Shape::kCols], spread over the block
//     .add<depth>(a, b)      C += A B^T, A [kRows, depth], B [kCols, depth]
//     .each(f)               f(row, col, value) for the elements that this thread holds
//
// A product made another way (wgmma, say) needs to offer only these.
#pragma once

#include "primitives.cuh"

namespace dml::cuda {

// What lies in shared memory, seen as element (i, k) with k the dimension that is summed over.
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
template <typename T>
struct ResidentAlongK {  // like AlongK, with a pitch known at run time
    using Value = T;
    static constexpr bool kAlongK = true;
    const T* data;
    int pitch;
    DML_DEVICE const T* at(int i, int k) const { return data + i * pitch + k; }
};

// The tile of a block, and how its warps share it. Symmetric: the product of (a, b) has the same bits as
// that of (b, a), for kernels that compute a similarity from both sides.
template <int Rows, int Cols, int WarpRows, int WarpCols, bool Symmetric>
struct Shape {
    static constexpr int kRows = Rows, kCols = Cols;
    static constexpr int kWarpRows = WarpRows, kWarpCols = WarpCols;
    static constexpr int kThreads = WarpRows * WarpCols * kWarpSize;
    static constexpr bool kSymmetric = Symmetric;
};

// ---- plain multiply-adds ----------------------------------------------------------------------------

template <typename T>
struct SimtMath {
    using Value = T;
    using Acc = T;
    static constexpr bool kTensorCores = false;
};

// ---- tensor cores: each struct loads fragments (primitives.cuh shows their layout) and multiplies -----

// float16 and bfloat16 as they are.
template <typename T>
struct HalfMath {
    using Value = T;
    using Acc = float;
    static constexpr bool kTensorCores = true;
    static constexpr int kDepth = kMmaK<T>;
    struct A {
        uint32_t r[4];
    };
    struct B {
        uint32_t r[2];
    };

    template <typename View>
    static DML_DEVICE void load(A& a, const View& view, int row, int k) {
        const int lane = lane_id();
        if constexpr (sizeof(typename View::Value) == 4) {  // floats, rounded on the way
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) {
                const int at_row = row + g + 8 * (i & 1), at_k = k + 2 * t + 8 * (i / 2);
                a.r[i] = pack2<T>(*view.at(at_row, at_k), *view.at(at_row, at_k + 1));
            }
        } else if constexpr (View::kAlongK) {
            ldmatrix_x4(a.r, view.at(row + lane % 16, k + 8 * (lane / 16)));
        } else {
            ldmatrix_x4_trans(a.r, view.at(row + 8 * (lane / 8 % 2), k + lane % 8 + 8 * (lane / 16)));
        }
    }
    template <typename View>
    static DML_DEVICE void load(B& b, const View& view, int col, int k) {
        const int lane = lane_id() % 16;
        if constexpr (View::kAlongK) {
            ldmatrix_x2(b.r, view.at(col + lane % 8, k + 8 * (lane / 8)));
        } else {
            ldmatrix_x2_trans(b.r, view.at(col, k + lane));
        }
    }
    template <bool Symmetric>
    static DML_DEVICE void multiply(float (&acc)[4], const A& a, const B& b) {
        mma<T>(acc, a.r, b.r);
    }
};

// Floats (or float16, which tf32 holds exactly, with an exponent to spare) on tf32 units. With Split each
// operand is the sum of two tf32 numbers and the product the sum of three: as accurate as float32.
template <typename T, bool Split>
struct Tf32Math {
    using Value = T;
    using Acc = float;
    static constexpr bool kTensorCores = true;
    static constexpr int kDepth = kMmaK<Tf32>;
    template <int Registers>
    struct Fragment {
        uint32_t big[Registers], small[Split ? Registers : 1];
    };
    using A = Fragment<4>;
    using B = Fragment<2>;

    template <int Registers>
    static DML_DEVICE void set(Fragment<Registers>& f, int i, float x) {
        f.big[i] = to_tf32(x);
        // The 13 bits that tf32 has not are unspecified, and must not count as part of the big number.
        if constexpr (Split) f.small[i] = to_tf32(x - __uint_as_float(f.big[i] & 0xffffe000u));
    }
    template <typename View>
    static DML_DEVICE void load(A& a, const View& view, int row, int k) {
        if constexpr (View::kAlongK && sizeof(typename View::Value) == 4) {
            uint32_t x[4];
            ldmatrix_x4(x, view.at(row + lane_id() % 16, k + 4 * (lane_id() / 16)));
#pragma unroll
            for (int i = 0; i < 4; ++i) set(a, i, __uint_as_float(x[i]));
        } else {
            const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                set(a, i, float(*view.at(row + g + 8 * (i & 1), k + t + 4 * (i / 2))));
        }
    }
    template <typename View>
    static DML_DEVICE void load(B& b, const View& view, int col, int k) {
        if constexpr (View::kAlongK && sizeof(typename View::Value) == 4) {
            uint32_t x[2];
            ldmatrix_x2(x, view.at(col + lane_id() % 8, k + 4 * (lane_id() % 16 / 8)));
#pragma unroll
            for (int i = 0; i < 2; ++i) set(b, i, __uint_as_float(x[i]));
        } else {
            const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
            for (int i = 0; i < 2; ++i) set(b, i, float(*view.at(col + g, k + t + 4 * i)));
        }
    }
    // Tensor cores truncate what they add up. Where float32's accuracy is wanted each step therefore starts
    // at 0 and joins the sum by an ordinary addition, which rounds. Where symmetry is, neither of big * small
    // and small * big comes first.
    template <bool Symmetric>
    static DML_DEVICE void multiply(float (&acc)[4], const A& a, const B& b) {
        if constexpr (!Split) {
            mma<Tf32>(acc, a.big, b.big);
        } else if constexpr (Symmetric) {
            float big[4] = {}, left[4] = {}, right[4] = {};
            mma<Tf32>(left, a.small, b.big);
            mma<Tf32>(right, a.big, b.small);
            mma<Tf32>(big, a.big, b.big);
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[e] += big[e] + (left[e] + right[e]);
        } else {
            float step[4] = {};
            mma<Tf32>(step, a.small, b.big);
            mma<Tf32>(step, a.big, b.small);
            mma<Tf32>(step, a.big, b.big);
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[e] += step[e];
        }
    }
};

// Floats rounded to bfloat16 as they are loaded.
struct Bf16Math {
    using Value = float;
    using Acc = float;
    static constexpr bool kTensorCores = true;
    static constexpr int kDepth = kMmaK<__nv_bfloat16>;
    using A = HalfMath<__nv_bfloat16>::A;
    using B = HalfMath<__nv_bfloat16>::B;

    template <typename View>
    static DML_DEVICE uint32_t pair(const View& view, int i, int k) {
        return pack2<__nv_bfloat16>(*view.at(i, k), *view.at(i, k + 1));
    }
    template <typename View>
    static DML_DEVICE void load(A& a, const View& view, int row, int k) {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) a.r[i] = pair(view, row + g + 8 * (i & 1), k + 2 * t + 8 * (i / 2));
    }
    template <typename View>
    static DML_DEVICE void load(B& b, const View& view, int col, int k) {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) b.r[i] = pair(view, col + g, k + 2 * t + 8 * i);
    }
    template <bool Symmetric>
    static DML_DEVICE void multiply(float (&acc)[4], const A& a, const B& b) {
        mma<__nv_bfloat16>(acc, a.r, b.r);
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

    float acc[kRowTiles][kColTiles][4] = {};

    static DML_DEVICE int row0() { return warp_id() / Shape::kWarpCols * kRowTiles * 16; }
    static DML_DEVICE int col0() { return warp_id() % Shape::kWarpCols * kColTiles * 8; }

    template <int Depth, typename ViewA, typename ViewB>
    DML_DEVICE void add(const ViewA& view_a, const ViewB& view_b) {
        static_assert(Depth % Math::kDepth == 0, "whole steps only");
#pragma unroll
        for (int k = 0; k < Depth; k += Math::kDepth) {
            typename Math::A a[kRowTiles];
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) Math::load(a[i], view_a, row0() + 16 * i, k);
#pragma unroll
            for (int j = 0; j < kColTiles; ++j) {
                typename Math::B b;
                Math::load(b, view_b, col0() + 8 * j, k);
#pragma unroll
                for (int i = 0; i < kRowTiles; ++i) {
                    Math::template multiply<Shape::kSymmetric>(acc[i][j], a[i], b);
                }
            }
        }
    }

    template <typename F>
    DML_DEVICE void each(const F& f) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    f(row0() + 16 * i + g + 8 * (e / 2), col0() + 8 * j + 2 * t + e % 2, acc[i][j][e]);
                }
            }
        }
    }
};

template <typename Math, typename Shape>
struct Product<Math, Shape, false> {
    using T = typename Math::Acc;
    static constexpr int kVector = 16 / int(sizeof(T));                     // elements along k read at once
    static constexpr int kAcross = Shape::kRows >= Shape::kCols ? 16 : 32;  // threads along a row of C
    static constexpr int kDown = Shape::kThreads / kAcross;
    static constexpr int kRowsEach = Shape::kRows / kDown, kColsEach = Shape::kCols / kAcross;
    static_assert(kRowsEach * kDown == Shape::kRows && kColsEach * kAcross == Shape::kCols, "even shares");

    T acc[kRowsEach][kColsEach] = {};

    template <typename View>
    static DML_DEVICE void load(T (&x)[kVector], const View& view, int i, int k) {
        if constexpr (View::kAlongK) {
            struct alignas(16) Vector {
                T value[kVector];
            };
            const Vector v = *reinterpret_cast<const Vector*>(view.at(i, k));
#pragma unroll
            for (int e = 0; e < kVector; ++e) x[e] = v.value[e];
        } else {
#pragma unroll
            for (int e = 0; e < kVector; ++e) x[e] = *view.at(i, k + e);
        }
    }

    template <int Depth, typename ViewA, typename ViewB>
    DML_DEVICE void add(const ViewA& view_a, const ViewB& view_b) {
        const int down = int(threadIdx.x) / kAcross, across = int(threadIdx.x) % kAcross;
#pragma unroll 2
        for (int k = 0; k < Depth; k += kVector) {
            T a[kRowsEach][kVector], b[kColsEach][kVector];
#pragma unroll
            for (int i = 0; i < kRowsEach; ++i) load(a[i], view_a, down + i * kDown, k);
#pragma unroll
            for (int j = 0; j < kColsEach; ++j) load(b[j], view_b, across + j * kAcross, k);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
#pragma unroll
                for (int i = 0; i < kRowsEach; ++i) {
#pragma unroll
                    for (int j = 0; j < kColsEach; ++j) acc[i][j] = std::fma(a[i][e], b[j][e], acc[i][j]);
                }
            }
        }
    }

    template <typename F>
    DML_DEVICE void each(const F& f) const {
        const int down = int(threadIdx.x) / kAcross, across = int(threadIdx.x) % kAcross;
#pragma unroll
        for (int i = 0; i < kRowsEach; ++i) {
#pragma unroll
            for (int j = 0; j < kColsEach; ++j) f(down + i * kDown, across + j * kAcross, acc[i][j]);
        }
    }
};

}  // namespace dml::cuda
