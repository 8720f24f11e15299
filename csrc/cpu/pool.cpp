// Threads: those that torch's own OpenMP runtime keeps, taken by the function that GCC's `#pragma omp parallel` calls.
//
// at::parallel_for would need libtorch, and linking an OpenMP runtime would load a second one beside torch's, whose threads
// would compete with the first's for the same cores. torch loads its runtime with global symbols, so it is found by name.
#include <dlfcn.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <atomic>
#include <cstdlib>
#include <new>

#include "ops.h"

namespace ebr::cpu {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel parallel() {
    static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Work {
    std::atomic<int64_t> next{0};
    int64_t parts;
    void (*part)(void*, int64_t);
    void* data;

    // Whoever is free takes the next part, so a thread that another program delays holds up one part alone.
    void run() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) part(data, i);
    }
};

struct Kept {
    void* address = nullptr;
    size_t bytes = 0;
    ~Kept() { std::free(address); }
};
thread_local Kept kept[3];

}  // namespace

void leave(Use use) {
    Kept& one = kept[static_cast<int>(use)];
    std::free(one.address);
    one.address = nullptr;
    one.bytes = 0;
}

void* room(Use use, size_t bytes) {
    Kept& one = kept[static_cast<int>(use)];
    if (one.bytes < bytes) {
        std::free(one.address);
        one.bytes = (bytes + 4095) / 4096 * 4096;
        one.address = std::aligned_alloc(64, one.bytes);
        if (!one.address) one.bytes = 0, throw std::bad_alloc();
    }
    return one.address;
}

// glibc gives memory of some size back to the system when it is freed, and takes it again, every page anew and zeroed, for
// the next activation: 8 % of an evaluation's time in float32 at 256 x 256. What is kept is at most the last limit. Larger pieces
// are taken anew, for about 1 % of the time of evaluations that have them: kept, they leave holes that the next ones do not fit.
void keep_memory() {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 8 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

// Steps of learning take the same pieces again and again, and all that one has kept for its gradients is free when it ends.
void keep_steps() {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most that glibc takes
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}

void return_memory() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

bool pooled() { return parallel() != nullptr; }

void spread(int64_t parts, int threads, void (*part)(void*, int64_t), void* data) {
    Work work;
    work.parts = parts;
    work.part = part;
    work.data = data;
    if (threads > parts) threads = static_cast<int>(parts);
    if (threads <= 1 || !pooled()) return work.run();
    parallel()([](void* given) { static_cast<Work*>(given)->run(); }, &work, static_cast<unsigned>(threads), 0);
}

}  // namespace ebr::cpu
