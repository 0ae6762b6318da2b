// C = A B^T as a tensor-core kernel does it: cp.async into two stages, ldmatrix, mma. Once right, and
// once with each of the mistakes that the emulator must catch. Arguments: type, mistake, M, N, K;
// A [M, K] and B [N, K] come from stdin and C [M, N], in float, goes to stdout. M and N are multiples
// of 64, and rows of 16 bytes.
#include <cstdlib>
#include <type_traits>

#include "planted_bugs.h"

namespace dml {
namespace {

enum class Mistake {
    kNone,
    kReadsBeforeBarrier,    // no barrier between a thread's wait and the others' reads
    kRefillsBeforeBarrier,  // no barrier between the last read of a stage and its refill
    kSkipsWait,             // reads copies still under way
    kReadsOtherRow,         // a shifted index that stays inside
    kReadsBeyondGlobal,     // one that leaves the input
    kReadsBeyondShared,     // one that leaves the shared array, for what is the next one on a GPU
    kReadsUnwritten,        // shared memory that nobody filled
    kBarrierInOneWarp,      // a barrier that the other warps never reach
    kBarrierInBranches,     // two barriers that different warps mistake for one
    kHalfAWarp,             // a shuffle by 16 lanes while the others go on
    kLanesReturn,           // lanes that return while the others still need them
    kMisaligned,            // a 16-byte copy to an address that is a multiple of 8
};
constexpr int kMistakes = int(Mistake::kMisaligned) + 1;

constexpr int kTile = 64;  // rows of A and of B in a block, one warp to 16 rows of A
constexpr int kThreads = 128;
constexpr int kChunkBytes = 64;  // of a row, in a stage
constexpr int kPitch = kChunkBytes + 16;
constexpr int kStageBytes = kTile * kPitch;
constexpr int kMmaBytes = 32;  // along k: 16 elements of 2 bytes, or 8 of 4

template <typename T>
using Element = std::conditional_t<std::is_same_v<T, Tf32>, float, T>;

template <typename T, Mistake kMistake>
__global__ void __launch_bounds__(kThreads)
    gemm(const Element<T>* a, const Element<T>* b, float* c, int n, int k) {
    char* shared_a = shared_array<char>(0, 2 * kStageBytes);
    char* shared_b = shared_array<char>(2 * kStageBytes, 2 * kStageBytes);
    const int first_i = blockIdx.y * kTile;
    const int first_j = blockIdx.x * kTile;
    const int row_bytes = k * int(sizeof(Element<T>));
    const int chunks = (row_bytes + kChunkBytes - 1) / kChunkBytes;

    const auto fetch = [&](int chunk) {
        for (int piece = threadIdx.x; piece < kTile * kChunkBytes / 16; piece += kThreads) {
            int row = piece / (kChunkBytes / 16);
            int byte = piece % (kChunkBytes / 16) * 16;
            if (kMistake == Mistake::kReadsUnwritten && row == 5) continue;
            const int left = row_bytes - (chunk * kChunkBytes + byte);
            const int valid = left < 0 ? 0 : left < 16 ? left : 16;
            char* to_a = shared_a + chunk % 2 * kStageBytes + row * kPitch + byte;
            char* to_b = shared_b + chunk % 2 * kStageBytes + row * kPitch + byte;
            if (kMistake == Mistake::kReadsBeyondGlobal) ++row;
            if (kMistake == Mistake::kMisaligned) to_a -= 8;
            const size_t offset = valid == 0 ? 0 : size_t(chunk) * kChunkBytes + byte;
            const char* row_a = reinterpret_cast<const char*>(a + size_t(first_i + row) * k);
            const char* row_b = reinterpret_cast<const char*>(b + size_t(first_j + row) * k);
            cp_async<16>(to_a, row_a + offset, valid);
            cp_async<16>(to_b, row_b + offset, valid);
        }
        cp_async_commit();
    };

    const int lane = lane_id();
    if (kMistake == Mistake::kLanesReturn && lane >= 16) return;
    float acc[kTile / 8][4] = {};
    fetch(0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk + 1 < chunks) {
            fetch(chunk + 1);
            if (kMistake != Mistake::kSkipsWait) cp_async_wait<1>();
        } else {
            if (kMistake != Mistake::kSkipsWait) cp_async_wait<0>();
        }
        if constexpr (kMistake == Mistake::kBarrierInOneWarp) {
            if (warp_id() == 0) block_sync();
        } else if constexpr (kMistake == Mistake::kBarrierInBranches) {
            if (warp_id() == 0) {
                block_sync();
            } else {
                block_sync();
            }
        } else if constexpr (kMistake != Mistake::kReadsBeforeBarrier) {
            block_sync();
        }
        if (kMistake == Mistake::kHalfAWarp && lane < 16) acc[0][0] = shfl(acc[0][0], 0);

        for (int byte = 0; byte < kChunkBytes; byte += kMmaBytes) {
            int row = warp_id() * 16 + lane % 16;
            if (kMistake == Mistake::kReadsOtherRow) row ^= 1;
            if (kMistake == Mistake::kReadsBeyondShared) row += 16;
            const char* stage_a = shared_a + chunk % 2 * kStageBytes;
            const char* stage_b = shared_b + chunk % 2 * kStageBytes;
            uint32_t fragment_a[4];
            ldmatrix_x4(fragment_a, stage_a + row * kPitch + byte + lane / 16 * 16);
            for (int j = 0; j < kTile / 8; j += 2) {
                // Two tiles of 8 columns at once: by x4 where it is the last time, else by x2.
                const char* row_b = stage_b + (j * 8 + lane % 8) * kPitch + byte + lane / 8 % 2 * 16;
                uint32_t fragment_b[2][2];
                if (byte == 0) {
                    ldmatrix_x2(fragment_b[0], row_b);
                    ldmatrix_x2(fragment_b[1], row_b + 8 * kPitch);
                } else {
                    uint32_t both[4];
                    ldmatrix_x4(both, row_b + lane / 16 * 8 * kPitch);
                    for (int r = 0; r < 4; ++r) fragment_b[r / 2][r % 2] = both[r];
                }
                mma<T>(acc[j], fragment_a, fragment_b[0]);
                mma<T>(acc[j + 1], fragment_a, fragment_b[1]);
            }
        }
        if (kMistake != Mistake::kRefillsBeforeBarrier) block_sync();
    }

    for (int j = 0; j < kTile / 8; ++j) {
        for (int e = 0; e < 4; ++e) {
            const int row = first_i + warp_id() * 16 + lane / 4 + e / 2 * 8;
            const int column = first_j + j * 8 + lane % 4 * 2 + e % 2;
            c[size_t(row) * n + column] = acc[j][e];
        }
    }
}

template <typename T, int kFirst = 0>
void run(int mistake, int m, int n, int k) {
    if (mistake != kFirst) {
        // One type is enough to make mistakes with.
        if constexpr (std::is_same_v<T, __half> && kFirst + 1 < kMistakes) {
            return run<T, kFirst + 1>(mistake, m, n, k);
        }
        throw std::runtime_error("no such mistake");
    }
    const auto a = read<Element<T>>(size_t(m) * k);
    const auto b = read<Element<T>>(size_t(n) * k);
    Array<float> c(size_t(m) * n);
    launch(gemm<T, Mistake(kFirst)>, dim3(n / kTile, m / kTile), dim3(kThreads), 4 * kStageBytes, nullptr,
           a.data(), b.data(), c.data(), n, k);
    write(c);
}

}  // namespace
}  // namespace dml

int main(int count, char** arguments) {
    return dml::report([&] {
        if (count != 6) throw std::runtime_error("arguments: type, mistake, M, N, K");
        const std::string type = arguments[1];
        const int mistake = std::atoi(arguments[2]);
        const int m = std::atoi(arguments[3]), n = std::atoi(arguments[4]), k = std::atoi(arguments[5]);
        if (type == "half") {
            dml::run<__half>(mistake, m, n, k);
        } else if (type == "bfloat16") {
            dml::run<__nv_bfloat16>(mistake, m, n, k);
        } else {
            dml::run<dml::Tf32>(mistake, m, n, k);
        }
    });
}
