// Asks for shared memory and for the code's version as launches do, and prints the requests that reach the driver.
#include "cuda/common/known_kernels.h"

#include <cstdio>
#include <stdexcept>

int main() {
    const char kernels[2] = {};
    dml::KnownKernels known;
    const auto ask = [&](int kernel, int device, int bytes, bool fails = false) {
        known.ensure_shared(&kernels[kernel], device, std::size_t(bytes), [&] {
            std::printf("%d %d %d\n", kernel, device, bytes);
            if (fails) throw std::runtime_error("refused");
        });
    };
    const auto ask_version = [&](int kernel, int device, int version) {
        return known.code_version(&kernels[kernel], device, [&] {
            std::printf("%d %d version\n", kernel, device);
            return version;
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
    const bool good =
        ask_version(0, 0, 90) == 90 && ask_version(0, 0, 80) == 90 && ask_version(0, 1, 80) == 80;
    ask(0, 0, 60);
    return good ? 0 : 1;
}
