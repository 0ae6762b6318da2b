// Asks for shared memory as launches do, and prints the requests that reach the driver.
#include "cuda/common/opt_in.h"

#include <cstdio>
#include <stdexcept>

int main() {
    const char kernels[2] = {};
    dml::OptedIn opted_in;
    const auto ask = [&](int kernel, int device, int bytes, bool fails = false) {
        opted_in.ensure(&kernels[kernel], device, std::size_t(bytes), [&] {
            std::printf("%d %d %d\n", kernel, device, bytes);
            if (fails) throw std::runtime_error("refused");
        });
    };
    ask(0, 0, 60);
    ask(0, 0, 60);
    ask(0, 0, 50);
    ask(0, 0, 70);
    ask(0, 0, 60);
    ask(0, 1, 60);
    ask(1, 0, 60);
    try {
        ask(1, 1, 90, true);
    } catch (const std::runtime_error&) {
    }
    ask(1, 1, 90);
}
