// A fiber: a stack, and where the code on it stopped. Nothing here knows of CUDA.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(DML_EMULATOR_UCONTEXT)
#define DML_EMULATOR_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
   public:
    Fiber() = default;  // the fiber of the caller itself: it has a stack already
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    ~Fiber();

    // The next switch to this fiber calls entry() on its own stack. entry must not return.
    void prepare(void (*entry)());

    // Stops here and goes on where `to` stopped; returns when someone switches back. A fiber that
    // will never be resumed says that it is `finished`.
    void switch_to(Fiber& to, bool finished = false);

   private:
    static void start();
    void arrived();

    void (*entry_)() = nullptr;
    void* mapping_ = nullptr;
    const void* stack_bottom_ = nullptr;
    size_t stack_bytes_ = 0;
    void* asan_stack_ = nullptr;  // AddressSanitizer's own record of this stack
    void* tsan_fiber_ = nullptr;  // ThreadSanitizer's
#if defined(DML_EMULATOR_USES_UCONTEXT)
    ucontext_t context_;
#else
    void* stack_pointer_ = nullptr;
#endif
};

}  // namespace emulator
