#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

// The sanitizers must be told of every switch. This file is compiled without them, so it asks the
// linker whether they are there.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t*);
[[gnu::weak]] void __asan_unpoison_memory_region(void const volatile*, size_t);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void*);
[[gnu::weak]] void __tsan_switch_to_fiber(void*, unsigned flags);
}

namespace emulator {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kStackBytes = 256 * 1024;  // mapped, but only touched pages cost memory
constexpr size_t kColours = 32, kColourBytes = 576;
constexpr unsigned kTsanNoSync = 1;  // a switch orders nothing: only barriers do

Fiber* leaving = nullptr;
Fiber* entering = nullptr;

}  // namespace

#if !defined(DML_EMULATOR_USES_UCONTEXT)

// Pushes the registers that a call preserves (System V ABI), swaps the stack pointer, pops them.
// About 20 times cheaper than swapcontext, which makes a system call for the signal mask.
extern "C" void dml_emulator_swap_stack(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl dml_emulator_swap_stack
.type dml_emulator_swap_stack, @function
dml_emulator_swap_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size dml_emulator_swap_stack, .-dml_emulator_swap_stack
)");

#endif

Fiber::~Fiber() {
    if (mapping_) munmap(mapping_, kStackBytes + kPageBytes);
    if (tsan_fiber_ && mapping_) __tsan_destroy_fiber(tsan_fiber_);
}

void Fiber::prepare(void (*entry)()) {
    entry_ = entry;
    if (!mapping_) {
        mapping_ = mmap(nullptr, kStackBytes + kPageBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapping_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(mapping_, kPageBytes, PROT_NONE);  // an overflow faults
        stack_bottom_ = static_cast<char*>(mapping_) + kPageBytes;
        stack_bytes_ = kStackBytes;
        // Stacks lie a multiple of a page apart; each begins elsewhere on its page, or the lines that all
        // use would fall into the same few sets of the cache.
        static size_t stacks = 0;
        stack_bytes_ -= stacks++ % kColours * kColourBytes;
        if (__tsan_create_fiber) tsan_fiber_ = __tsan_create_fiber(0);
    }
    // What an abandoned run left poisoned must not trip the next one.
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_bottom_, stack_bytes_);
    asan_stack_ = nullptr;

#if defined(DML_EMULATOR_USES_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = const_cast<void*>(stack_bottom_);
    context_.uc_stack.ss_size = stack_bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::start, 0);
#else
    // The stack that dml_emulator_swap_stack expects: six registers, the address to return to, and
    // above it a null return address, which also leaves the stack aligned as a call would.
    char* top = static_cast<char*>(const_cast<void*>(stack_bottom_)) + stack_bytes_;
    auto* words = reinterpret_cast<uintptr_t*>(top) - 8;
    for (int i = 0; i < 6; ++i) words[i] = 0;
    words[6] = reinterpret_cast<uintptr_t>(&Fiber::start);
    words[7] = 0;
    stack_pointer_ = words;
#endif
}

void Fiber::switch_to(Fiber& to, bool finished) {
    leaving = this;
    entering = &to;
    if (__sanitizer_start_switch_fiber) {
        __sanitizer_start_switch_fiber(finished ? nullptr : &asan_stack_, to.stack_bottom_, to.stack_bytes_);
    }
    if (__tsan_switch_to_fiber) {
        if (!tsan_fiber_) tsan_fiber_ = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(to.tsan_fiber_, kTsanNoSync);
    }
#if defined(DML_EMULATOR_USES_UCONTEXT)
    swapcontext(&context_, &to.context_);
#else
    dml_emulator_swap_stack(&stack_pointer_, to.stack_pointer_);
#endif
    arrived();
}

void Fiber::arrived() {
    if (!__sanitizer_finish_switch_fiber) return;
    // Tells where the fiber we came from has its stack; that of the first caller is learnt here.
    __sanitizer_finish_switch_fiber(asan_stack_, &leaving->stack_bottom_, &leaving->stack_bytes_);
}

void Fiber::start() {
    Fiber* self = entering;
    self->arrived();
    self->entry_();
    __builtin_trap();  // entry must not return
}

}  // namespace emulator
