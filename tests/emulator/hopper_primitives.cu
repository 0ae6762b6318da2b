// Small kernels on mbarriers, bulk copies and named barriers, and mistakes with each. The argument is the kernel's name;
// the output goes to stdout as raw 32-bit words, a few for each of 128 threads.
#include "cuda/common/mbarrier.cuh"
#include "planted_bugs.h"

namespace dml {
namespace {

constexpr int kThreads = 128;
constexpr int kWords = 2;  // that each thread writes

__global__ void __launch_bounds__(kThreads) copy(uint32_t* out, uint32_t* in) {
    uint32_t* landing = shared_array<uint32_t>(0, kThreads);
    Mbarrier* full = shared_array<Mbarrier>(kThreads * 4, 1);
    const int i = int(threadIdx.x);
    landing[i] = 1;
    if (i == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        fence_async_proxy();
    }
    block_sync();
    if (i == 0) {
        mbarrier_arrive_expect(full, kThreads * 4);
        bulk_copy(landing, in, kThreads * 4, full);
        out[0] = landing[kThreads - 1];  // neither what was there nor what is to come
    } else {
        out[i * kWords] = 0;
    }
    if (warp_id() == 2) {
        warp_sync();
        warp_sync();
        if (i == 64) in[0] = 77;  // nobody knows whether the copy reads this or what was there
    }
    mbarrier_wait(full, 0);
    out[i * kWords + 1] = landing[i];
}

// Each half of the block meets on its own, twice, and then the halves meet.
template <bool kAll>
__global__ void __launch_bounds__(kThreads) meet(uint32_t* out) {
    uint32_t* words = shared_array<uint32_t>(0, kThreads);
    const int i = int(threadIdx.x), half = i / 64;
    words[i] = uint32_t(i);
    if (kAll || warp_id() != 3) named_barrier_sync(1 + half, 64);
    const uint32_t other = words[i ^ 63];
    named_barrier_sync(1 + half, 64);
    words[i] = other + 1;
    named_barrier_sync(3, kThreads);
    out[i * kWords] = other;
    out[i * kWords + 1] = words[(i + 64) % kThreads];
}

// Phases of a barrier of all threads: nobody is two ahead.
__global__ void __launch_bounds__(kThreads) phases(uint32_t* out) {
    uint32_t* words = shared_array<uint32_t>(0, kThreads);
    Mbarrier* all = shared_array<Mbarrier>(kThreads * 4, 1);
    const int i = int(threadIdx.x);
    if (i == 0) mbarrier_init(all, kThreads);
    block_sync();
    for (int phase = 0; phase < 5; ++phase) {
        if (phase % 2 == 0) words[i] = uint32_t(100 * phase + i);
        mbarrier_arrive(all);
        mbarrier_wait(all, phase % 2);
        if (phase % 2 == 0) out[i * kWords] = words[(i + 37) % kThreads];
    }
    out[i * kWords + 1] = words[i];
}

#if defined(DML_CUDA_ON_HOST)

enum class Mistake {
    kUnaligned,
    kTooManyArrivals,
    kNotInitialised,
    kWrittenOver,
    kNamedZero,
    kNotFenced,
    kNotLanded
};

template <Mistake kMistake>
__global__ void __launch_bounds__(kThreads) wrong(uint32_t*, const uint32_t* in) {
    uint32_t* landing = shared_array<uint32_t>(0, kThreads);
    Mbarrier* barrier = shared_array<Mbarrier>(kThreads * 4, 1);
    if (threadIdx.x == 0 && kMistake != Mistake::kNotInitialised) {
        mbarrier_init(barrier, kMistake == Mistake::kTooManyArrivals ? 1 : kThreads);
        if (kMistake != Mistake::kNotFenced) fence_mbarrier_init();
        if (kMistake == Mistake::kWrittenOver) barrier->state = 0;
        if (kMistake == Mistake::kTooManyArrivals) mbarrier_arrive_expect(barrier, 16);
    }
    block_sync();
    if (kMistake == Mistake::kNamedZero) named_barrier_sync(0, kThreads);
    if (threadIdx.x == 0 && (kMistake == Mistake::kUnaligned || kMistake >= Mistake::kNotFenced)) {
        for (int i = 0; i < kThreads; i += 4)
            bulk_copy(landing + i + (kMistake == Mistake::kUnaligned), in + i, 16, barrier);
    }
    if (kMistake < Mistake::kNamedZero) mbarrier_arrive(barrier);
}

#endif

Array<uint32_t> run(const std::string& name) {
    Array<uint32_t> out(kThreads * kWords), in(kThreads);
    for (size_t i = 0; i < in.size(); ++i) in[i] = 1000 + uint32_t(i);
    const auto start = [&](auto* kernel, auto... more) {
        launch(kernel, dim3(1), dim3(kThreads), kThreads * 4 + sizeof(Mbarrier), nullptr, out.data(),
               more...);
        return out;
    };
    if (name == "copy") return start(copy, in.data());
    if (name == "meet") return start(meet<true>);
    if (name == "phases") return start(phases);
#if defined(DML_CUDA_ON_HOST)
    if (name == "one_warp_missing") return start(meet<false>);
    if (name == "unaligned") return start(wrong<Mistake::kUnaligned>, in.data());
    if (name == "too_many_arrivals") return start(wrong<Mistake::kTooManyArrivals>, in.data());
    if (name == "not_initialised") return start(wrong<Mistake::kNotInitialised>, in.data());
    if (name == "written_over") return start(wrong<Mistake::kWrittenOver>, in.data());
    if (name == "named_zero") return start(wrong<Mistake::kNamedZero>, in.data());
    if (name == "not_fenced") return start(wrong<Mistake::kNotFenced>, in.data());
    if (name == "not_landed") return start(wrong<Mistake::kNotLanded>, in.data());
#endif
    throw std::invalid_argument(name);
}

}  // namespace
}  // namespace dml

int main(int count, char** arguments) {
    return dml::report([&] {
        dml::use_hopper();
        if (count != 2) throw std::invalid_argument("arguments: kernel");
        dml::write(dml::run(arguments[1]));
    });
}
