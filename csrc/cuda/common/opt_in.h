// Which kernels have opted in to how much shared memory: asked of the driver once for each kernel and device,
// and again only for more.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace dml {

class OptedIn {
   public:
    // Calls opt_in() unless it has succeeded for as many bytes before. Of all threads one at a time, so that
    // none takes back what another was granted.
    template <typename OptIn>
    void ensure(const void* kernel, int device, std::size_t bytes, const OptIn& opt_in) {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::size_t& granted = granted_[{kernel, device}];
        if (granted >= bytes) return;
        opt_in();
        granted = bytes;
    }

   private:
    std::mutex mutex_;
    std::map<std::pair<const void*, int>, std::size_t> granted_;
};

inline OptedIn& opted_in() {
    static OptedIn* const opted_in = new OptedIn;  // outlives whatever launches during the program's end
    return *opted_in;
}

}  // namespace dml
