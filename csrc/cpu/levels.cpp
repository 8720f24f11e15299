// Which levels this CPU has, asked of the CPU and of the operating system, which has to save the registers.
#include "levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ebr::cpu {
namespace {

#if defined(__x86_64__)
// Linux lets a process use tiles when it has asked; asked once, for all of its threads.
bool tiles_allowed() {
#if defined(__linux__)
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool has_bf16() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & (1u << 5);
}

bool has_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16 = d & (1u << 22), tile = d & (1u << 24);
    return bf16 && tile && tiles_allowed();
}
#endif

}  // namespace

std::vector<Level> levels() {
    std::vector<Level> found{{"baseline", &baseline}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
    found.push_back({"avx2", &avx2});
    for (const bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                           __builtin_cpu_supports("avx512vl"), __builtin_cpu_supports("avx512dq")})
        if (!has) return found;
    found.push_back({"avx512", &avx512});
    if (!has_bf16()) return found;
    found.push_back({"avx512_bf16", &avx512_bf16});
    if (has_amx()) found.push_back({"amx", &amx});
#endif
    return found;
}

}  // namespace ebr::cpu
