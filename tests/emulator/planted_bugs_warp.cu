// Small kernels, one warp function each, whose results the tests compare with what PTX says; and a
// few more mistakes. The arguments are the kernel's name and, where it converts numbers, how many to read
// from stdin; the output goes to stdout as raw 32-bit words.
#include "planted_bugs.h"

namespace dml {
namespace {

constexpr int kThreads = 64;
constexpr int kWords = 4;  // that each thread writes

// Element i of the shared matrices is the number i: the registers tell where they were loaded from.
template <int kKind>
__global__ void load_matrix(uint32_t* out) {
    uint16_t* matrix = shared_array<uint16_t>(0, 32 * 8);
    for (int i = threadIdx.x; i < 32 * 8; i += kThreads) matrix[i] = uint16_t(i);
    block_sync();
    const uint16_t* row = matrix + lane_id() * 8;
    uint32_t four[4] = {};
    uint32_t two[2] = {};
    if constexpr (kKind == 0) ldmatrix_x4(four, row);
    if constexpr (kKind == 1) ldmatrix_x4_trans(four, row);
    if constexpr (kKind == 2) ldmatrix_x2(two, row);
    if constexpr (kKind == 3) ldmatrix_x2_trans(two, row);
    for (int r = 0; r < 4; ++r) out[threadIdx.x * kWords + r] = four[r];
    for (int r = 0; r < 2; ++r) out[threadIdx.x * kWords + r] |= two[r];
}

__global__ void shuffle(uint32_t* out) {
    const uint32_t value = threadIdx.x;
    uint32_t* words = out + threadIdx.x * kWords;
    words[0] = shfl_xor(value, 5);
    words[1] = shfl(value, 7);
    words[2] = uint32_t(shfl_xor(double(value) + 0.25, 16) * 4.0);
    words[3] = uint32_t(shfl(float(value) + 0.5f, 31 - lane_id()) * 2.0f);
}

__global__ void vote(uint32_t* out) {
    uint32_t* words = out + threadIdx.x * kWords;
    words[0] = warp_ballot(threadIdx.x % 3 == 0);
    words[1] = warp_any(threadIdx.x == 40);
    words[2] = warp_any(threadIdx.x >= 64);
    words[3] = warp_any(threadIdx.x < 64);
}

// What the copies leave behind, byte by byte: read at the wait, before it, and zero-filled.
__global__ void copy(uint32_t* out, const uint32_t* in) {
    uint32_t* arrived = shared_array<uint32_t>(0, kThreads * 4);
    uint32_t* under_way = shared_array<uint32_t>(kThreads * 16, kThreads);
    const int i = threadIdx.x;
    cp_async<16>(arrived + 4 * i, in + 4 * i, 6);
    cp_async_commit();
    under_way[i] = 1;
    cp_async<4>(under_way + i, in + i);
    cp_async_commit();
    cp_async_wait<1>();
    out[i * kWords] = arrived[4 * i];
    out[i * kWords + 1] = arrived[4 * i + 1];
    out[i * kWords + 2] = arrived[4 * i + 3];
    out[i * kWords + 3] = under_way[i];
}

// Lanes exchange through shared memory without, or with, a warp barrier.
template <bool kSync>
__global__ void exchange(uint32_t* out) {
    uint32_t* words = shared_array<uint32_t>(0, kThreads);
    words[threadIdx.x] = threadIdx.x;
    if (kSync) warp_sync();
    for (int r = 0; r < kWords; ++r) out[threadIdx.x * kWords + r] = words[threadIdx.x ^ 1];
}

// Every block writes the same words.
__global__ void blocks_collide(uint32_t* out) {
    for (int r = 0; r < kWords; ++r) out[threadIdx.x * kWords + r] = 7;
}

__global__ void overlapping_arrays(uint32_t*) {
    shared_array<float>(0, 16);
    shared_array<float>(32, 16);
}

enum class Conversion { kFromHalf, kToHalf, kToBfloat16, kSplit, kExp2 };

__global__ void convert(Conversion conversion, uint32_t* out, const uint32_t* in, int count) {
    for (int i = threadIdx.x; i < count; i += kThreads) {
        const float x = __uint_as_float(in[i]);
        uint32_t* words = out + 2 * i;
        switch (conversion) {
            case Conversion::kFromHalf:
                words[0] = __float_as_uint(float(reinterpret_cast<const __half*>(in)[2 * i]));
                break;
            case Conversion::kToHalf:
                words[0] = pack2<__half>(x, -x);
                break;
            case Conversion::kToBfloat16:
                words[0] = pack2<__nv_bfloat16>(x, -x);
                break;
            case Conversion::kSplit:
                split_tf32(x, words[0], words[1]);
                break;
            case Conversion::kExp2:
                words[0] = __float_as_uint(exp2_approx(x));
                words[1] = to_tf32(x);
                break;
        }
    }
}

Array<uint32_t> run(const std::string& name, int count) {
    Array<uint32_t> out(kThreads * kWords);
    const auto simple = [&](void (*kernel)(uint32_t*), int blocks = 1, size_t shared_bytes = 2048) {
        launch(kernel, dim3(blocks), dim3(kThreads), shared_bytes, nullptr, out.data());
        wait_for_kernels();
        return out;
    };
    const auto converted = [&](Conversion conversion) {
        const Array<uint32_t> in = read<uint32_t>(count);
        out.assign(2 * size_t(count), 0);
        launch(convert, dim3(1), dim3(kThreads), 0, nullptr, conversion, out.data(), in.data(), count);
        wait_for_kernels();
        return out;
    };
    if (name == "from_half") return converted(Conversion::kFromHalf);
    if (name == "to_half") return converted(Conversion::kToHalf);
    if (name == "to_bfloat16") return converted(Conversion::kToBfloat16);
    if (name == "split") return converted(Conversion::kSplit);
    if (name == "exp2") return converted(Conversion::kExp2);
    if (name == "ldmatrix_x4") return simple(load_matrix<0>);
    if (name == "ldmatrix_x4_trans") return simple(load_matrix<1>);
    if (name == "ldmatrix_x2") return simple(load_matrix<2>);
    if (name == "ldmatrix_x2_trans") return simple(load_matrix<3>);
    if (name == "shuffle") return simple(shuffle);
    if (name == "vote") return simple(vote);
    if (name == "exchange") return simple(exchange<true>);
    if (name == "exchange_unsynced") return simple(exchange<false>);
    if (name == "blocks_collide") return simple(blocks_collide, 5);
    if (name == "no_blocks") return simple(blocks_collide, 0);
    if (name == "overlapping_arrays") return simple(overlapping_arrays);
    if (name == "too_little_shared") return simple(exchange<true>, 1, kThreads * 4 - 1);
    if (name == "too_much_shared") return simple(exchange<true>, 1, 1 << 20);
    if (name == "copy") {
        Array<uint32_t> in(kThreads * 4);
        for (size_t i = 0; i < in.size(); ++i) in[i] = 0x10001u * uint32_t(i + 1);
        launch(copy, dim3(1), dim3(kThreads), kThreads * 20, nullptr, out.data(), in.data());
        wait_for_kernels();
        return out;
    }
    throw std::invalid_argument(name);
}

}  // namespace
}  // namespace dml

int main(int count, char** arguments) {
    return dml::report([&] {
        if (count != 2 && count != 3) throw std::invalid_argument("arguments: kernel [count]");
        dml::write(dml::run(arguments[1], count == 3 ? std::stoi(arguments[2]) : 0));
    });
}
