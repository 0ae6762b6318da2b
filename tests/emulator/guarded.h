// How the C interfaces of the emulated kernels tell Python of an error.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>

// 0, or 1 with the message in `error`.
template <typename F>
int guarded(char* error, int64_t capacity, const F& f) {
    try {
        f();
        return 0;
    } catch (const std::exception& e) {
        std::strncpy(error, e.what(), size_t(capacity) - 1);
        error[capacity - 1] = 0;
        return 1;
    }
}
