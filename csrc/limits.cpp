#include "limits.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>

#if defined(__x86_64__) && defined(__GNUC__)
#define PYSEQ_X86 1
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

namespace pyseq {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

constexpr int STEPS = 8192;       // of each accumulator in one chunk: about 30 microseconds
constexpr int ACCUMULATORS = 12;  // independent: latency 4 times 2 issues a cycle is hidden, and 16 registers hold them

volatile float unknown_half = 0.5f;  // so that no compiler computes the outcome itself
volatile float sink;

// x = x * 0.5 + 0.5 stays at 1: no denormals, no infinities. Each chunk returns the multiply-adds it did.
#define PYSEQ_FMA_CHUNK(NAME, VECTOR, WIDTH, SET, STEP, STORE)               \
    double NAME() {                                                          \
        VECTOR acc[ACCUMULATORS];                                            \
        const VECTOR half = SET(unknown_half);                               \
        for (auto& x : acc) x = SET(1.0f);                                   \
        for (int step = 0; step < STEPS; ++step) {                           \
            _Pragma("GCC unroll 16") for (auto& x : acc) x = STEP(x, half);  \
        }                                                                    \
        float out[WIDTH];                                                    \
        for (auto& x : acc) {                                                \
            STORE(out, x);                                                   \
            sink = out[0];                                                   \
        }                                                                    \
        return double(STEPS) * ACCUMULATORS * WIDTH;                         \
    }

#ifdef PYSEQ_X86
#define PYSEQ_STEP_512(x, h) _mm512_fmadd_ps(x, h, h)
#define PYSEQ_STEP_256(x, h) _mm256_fmadd_ps(x, h, h)
#define PYSEQ_STEP_128(x, h) _mm_add_ps(_mm_mul_ps(x, h), h)
__attribute__((target("avx512f")))
PYSEQ_FMA_CHUNK(chunk_avx512, __m512, 16, _mm512_set1_ps, PYSEQ_STEP_512, _mm512_storeu_ps)
__attribute__((target("avx2,fma")))
PYSEQ_FMA_CHUNK(chunk_avx2, __m256, 8, _mm256_set1_ps, PYSEQ_STEP_256, _mm256_storeu_ps)
PYSEQ_FMA_CHUNK(chunk_sse2, __m128, 4, _mm_set1_ps, PYSEQ_STEP_128, _mm_storeu_ps)
#else
// Enough independent lanes for the compiler to fill whatever vectors it has.
double chunk_plain() {
    constexpr int LANES = 16 * ACCUMULATORS;
    float acc[LANES];
    const float half = unknown_half;
    std::fill_n(acc, LANES, 1.0f);
    for (int step = 0; step < STEPS / 16; ++step) {
        for (float& x : acc) x = x * half + half;
    }
    for (float x : acc) sink = x;
    return double(STEPS / 16) * LANES;
}
#endif

using Chunk = double (*)();

Chunk best_chunk() {
#ifdef PYSEQ_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return chunk_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return chunk_avx2;
    return chunk_sse2;
#else
    return chunk_plain;
#endif
}

std::size_t buffer_bytes() {
    std::size_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    cache = static_cast<std::size_t>(std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)));
#endif
    return std::clamp<std::size_t>(4 * cache, std::size_t(64) << 20, std::size_t(1) << 30);
}

constexpr std::size_t LINE = 64;

// Past the cache by non-temporal stores where there are any: no line of the target is read first.
void copy_lines(char* to, const char* from, std::size_t bytes) {
#ifdef PYSEQ_X86
    for (std::size_t i = 0; i < bytes; i += LINE) {
        for (std::size_t j = i; j < i + LINE; j += 16) {
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + j),
                             _mm_load_si128(reinterpret_cast<const __m128i*>(from + j)));
        }
    }
    _mm_sfence();
#else
    std::memcpy(to, from, bytes);
#endif
}

struct alignas(LINE) Line {
    char bytes[LINE];
};

}  // namespace

double fma_peak(int threads, double seconds) {
    threads = std::max(threads, 1);
    const Chunk chunk = best_chunk();
    double rate = 0;  // of the threads together
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : rate)
    for (int t = 0; t < threads; ++t) {
        chunk();  // wakes the vector units
        const auto begin = Clock::now();
        double done = 0, elapsed = 0;
        do {
            done += chunk();
            elapsed = since(begin);
        } while (elapsed < seconds);
        rate += done / elapsed;
    }
    return rate;
}

double copy_bandwidth(int threads, double seconds) {
    static std::mutex busy;
    static const std::size_t lines = buffer_bytes() / LINE;
    static const std::unique_ptr<Line[]> from(new Line[lines]()), to(new Line[lines]());  // kept: page faults are slow
    const std::lock_guard<std::mutex> lock(busy);
    threads = std::max(threads, 1);
    double rate = 0;  // of the threads together
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : rate)
    for (int t = 0; t < threads; ++t) {
        const std::size_t first = lines * t / threads, bytes = (lines * (t + 1) / threads - first) * LINE;
        const auto begin = Clock::now();
        double done = 0, elapsed = 0;
        do {
            copy_lines(to[first].bytes, from[first].bytes, bytes);
            done += 2.0 * double(bytes);
            elapsed = since(begin);
        } while (elapsed < seconds);
        rate += done / elapsed;
    }
    return rate;
}

}  // namespace pyseq
