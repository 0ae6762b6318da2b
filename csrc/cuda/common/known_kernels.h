// What the driver was asked and told of each kernel on each device, so that it is asked once.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace dml {

class KnownKernels {
   public:
    // Calls opt_in() unless it has succeeded for as many bytes of shared memory before. Of all threads one at a
    // time, so that none takes back what another was granted.
    template <typename OptIn>
    void ensure_shared(const void* kernel, int device, std::size_t bytes, const OptIn& opt_in) {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::size_t& granted = known_[{kernel, device}].shared_bytes;
        if (granted >= bytes) return;
        opt_in();
        granted = bytes;
    }

    // The architecture that its code was compiled for, above 0: ask() the first time.
    template <typename Ask>
    int code_version(const void* kernel, int device, const Ask& ask) {
        const std::lock_guard<std::mutex> lock(mutex_);
        int& version = known_[{kernel, device}].code_version;
        if (version == 0) version = ask();
        return version;
    }

   private:
    struct Facts {
        std::size_t shared_bytes = 0;  // granted
        int code_version = 0;
    };
    std::mutex mutex_;
    std::map<std::pair<const void*, int>, Facts> known_;
};

inline KnownKernels& known_kernels() {
    static KnownKernels* const known =
        new KnownKernels;  // outlives whatever launches during the program's end
    return *known;
}

}  // namespace dml
