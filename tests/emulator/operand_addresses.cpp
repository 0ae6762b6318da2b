// Where the emulator finds the elements of an operand. Arguments: a descriptor, and 1 where it is MN-major. For 64 of M
// or N and 16 of k: the shared address of each element, as 32-bit words.
#include <cstdio>
#include <cstdlib>

#include "wgmma.h"

int main(int, char** arguments) {
    const uint64_t descriptor = std::strtoull(arguments[1], nullptr, 10);
    for (int mn = 0; mn < 64; ++mn) {
        for (int k = 0; k < 16; ++k) {
            const uint32_t address = emulator::operand_address(descriptor, arguments[2][0] == '1', mn, k);
            std::fwrite(&address, sizeof address, 1, stdout);
        }
    }
}
