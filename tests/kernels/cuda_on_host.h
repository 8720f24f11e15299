// Runs csrc/*.cu on a CPU: included before each of them, it stands in for nvcc and a device.
//
// Every thread of a block is a fiber. At a barrier or a shuffle it hands over to the next one, so that when its turn comes
// again all others have got there too. That needs the live threads of a block to meet the same ones in the same order, which is
// checked: a kernel that does not is refused with an error. Blocks run one after another, so shared memory is static.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

inline dim3 threadIdx, blockIdx, blockDim;

namespace host {

enum class Stop { shuffle, barrier, end };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    dim3 thread;
    Stop stop;
    uint64_t posted[2];  // what it offers at even and at odd shuffles: a thread is never two ahead of another
    int shuffles;
};

inline std::vector<Fiber> fibers;
inline Fiber* running;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void stop(Stop reason) {
    running->stop = reason;
    swapcontext(&running->context, &scheduler);
}

inline void fiber_main() {
    body();
    running->stop = Stop::end;
}

inline bool run_block() {
    constexpr size_t STACK = 64 << 10;
    fibers.resize(blockDim.x * blockDim.y);
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        fiber.thread = dim3(i % blockDim.x, i / blockDim.x);
        fiber.stop = Stop::barrier;
        fiber.shuffles = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (Fiber& fiber : fibers) {
            if (fiber.stop == Stop::end) continue;
            running = &fiber;
            threadIdx = fiber.thread;
            swapcontext(&scheduler, &fiber.context);
            alive |= fiber.stop != Stop::end;
        }
        // A warp stops together, and a block at its barriers; whole warps may have ended, but then there is no barrier.
        const bool at_barrier = fibers[0].stop == Stop::barrier;
        for (size_t i = 0; i < fibers.size(); ++i)
            if (fibers[i].stop != fibers[i - i % 32].stop || (fibers[i].stop == Stop::barrier) != at_barrier) return false;
    }
    return true;
}

template <typename T>
T shuffle(T value, int other_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const int parity = running->shuffles++ % 2;
    std::memcpy(&running->posted[parity], &value, sizeof(T));
    stop(Stop::shuffle);
    const size_t first = (running - fibers.data()) / 32 * 32;
    std::memcpy(&value, &fibers[first + other_lane].posted[parity], sizeof(T));
    return value;
}

template <typename... P, typename... A>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
    const dim3 grid = config->gridDim;
    blockDim = config->blockDim;
    if (blockDim.x * blockDim.y > 1024 || blockDim.x % 32 || grid.y * grid.z != 1) return cudaErrorInvalidConfiguration;
    body = [=] { kernel(arguments...); };
    for (unsigned i = 0; i < grid.x; ++i) {
        blockIdx = dim3(i);
        if (!run_block()) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

template <typename To, typename From>
To as(From value) {
    To bits;
    std::memcpy(&bits, &value, sizeof(To));
    return bits;
}

}  // namespace host

#undef __shared__
#undef __global__
#undef __device__
#undef __launch_bounds__
#define __shared__ static
#define __global__
#define __device__
#define __launch_bounds__(threads)
#define cudaLaunchKernelEx host::launch
#define cudaGetErrorString(error) "the kernel cannot run"
#define __syncthreads() host::stop(host::Stop::barrier)
#define __shfl_xor_sync(mask, value, offset) host::shuffle(value, (threadIdx.x % 32) ^ (offset))
#define __ldcs(address) (*(address))
#define __ldg(address) (*(address))
#define __float_as_uint(value) host::as<unsigned>(static_cast<float>(value))
#define __uint_as_float(value) host::as<float>(static_cast<unsigned>(value))
#define __fmul_rn(a, b) ((a) * (b))
#define __frcp_rn(a) (1.0f / (a))
#define rsqrtf(a) (1.0f / std::sqrt(a))
