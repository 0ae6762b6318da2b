// What the programs that the sanitizers watch are made of.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

#include "core/problem.h"
#include "machine.h"

namespace dml {

// Not std::vector: the sanitizers see a block of exactly this size, uninitialised.
struct Buffer {
    static void release(void* data) {
        if (emulator::unwatch_memory) emulator::unwatch_memory(data);
        std::free(data);
    }
    explicit Buffer(int64_t bytes) : data(std::malloc(size_t(bytes)), release) {
        if (emulator::watch_memory) emulator::watch_memory(data.get(), size_t(bytes));
    }
    std::unique_ptr<void, decltype(&release)> data;
    template <typename T>
    T* as() const {
        return static_cast<T*>(data.get());
    }
};

// Filled with NaN.
inline Buffer poisoned(int64_t bytes) {
    Buffer buffer(bytes);
    std::memset(buffer.data.get(), 0xff, size_t(bytes));
    return buffer;
}

template <typename T>
struct Cloud {
    Buffer points, labels;
    Points view;

    Cloud(int64_t count, int64_t dim, int64_t stride)
        : points(count > 0 ? ((count - 1) * stride + dim) * int64_t(sizeof(T)) : 0),
          labels(count * int64_t(sizeof(int64_t))) {
        static unsigned state = 1;
        for (int64_t i = 0; i < count; ++i) {
            labels.as<int64_t>()[i] = i % 7;
            for (int64_t d = 0; d < dim; ++d) {
                state = state * 1664525u + 1013904223u;
                points.as<T>()[i * stride + d] = T(float(state >> 8) / float(1 << 24) - 0.3f);
            }
        }
        view = {points.data.get(), stride, labels.as<int64_t>(), count};
    }
};

// The queries among themselves where m is 0, else against the refs.
template <typename T>
Problem problem_of(const Cloud<T>& queries, const Cloud<T>& refs, int64_t m, int64_t dim, FormulaId formula,
                   Similarity similarity) {
    Problem p;
    p.queries = queries.view;
    p.square = m == 0;
    p.refs = p.square ? p.queries : refs.view;
    p.dim = dim;
    p.formula = formula;
    p.similarity = similarity;
    return p;
}

// The parameters of the formulas, by number.
inline constexpr double kParams[][3] = {{2, 50, 0.5}, {0.4, 80, 1}, {0.9, -3}, {2, 40, 0.5}, {0.1}, {0.1}};

// The program's end: 0, or 1 with an error's message.
template <typename F>
int watched(const F& f) {
    try {
        f();
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
    return 0;
}

}  // namespace dml
