// manta's CPU kernels: matrix products (gemm.h, codes.h), paged attention, rotary embedding, norms,
// SiLU, argmax, gated delta nets (delta.h), Mamba-2 (mamba2.h), sums over the ranks of a host
// (group.h).
//
// Plain C ABI, no headers but the standard library's and the system's. Vectors are GCC/Clang vector extensions, so
// the same source is right on any CPU; a few primitives have faster forms under #if. The loop over
// threads borrows the OpenMP runtime that torch uses (manta_init), since a second pool of
// threads would spin against torch's.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

namespace {

#include "threads.h"
#include "gemm.h"
#include "codes.h"
#include "vectors.h"
#include "cells.h"
#include "attention.h"
#include "rows.h"
#include "delta.h"
#include "mamba2.h"
#include "group.h"

}  // namespace

// ---------------------------------------------------------------- the C interface
// Each function once for each element type; strides and sizes in elements.

#define FOR_TYPE(name, E)                                                                         \
    extern "C" void manta_attend_##name(const Step* s, void* cache, const void* q, int64_t qs,    \
                                        const void* k, int64_t ks, const void* v, int64_t vs,     \
                                        void* out, const float* sinks, int window,                \
                                        int threads) {                                            \
        (s->fp8 ? attend<CodedCells<E>> : attend<PlainCells<E>>)(                                 \
            *s, cache, q, qs, k, ks, v, vs, out, sinks, window, threads);                         \
    }                                                                                             \
    extern "C" void manta_rope_##name(void* q, int64_t q_stride, int q_heads, void* k,            \
                                      int64_t k_stride, int k_heads, int dim, int64_t tokens,     \
                                      const int64_t* positions, const float* cos,                 \
                                      const float* sin, int half, int threads) {                  \
        const int64_t grain = grain_of(tokens, int64_t(q_heads + k_heads) * dim, threads);        \
        parallel_for(threads, tokens, grain, [&](int64_t begin, int64_t end) {                    \
            rope<E>((E::T*)q, q_stride, q_heads, dim, positions, cos, sin, half, begin, end);     \
            rope<E>((E::T*)k, k_stride, k_heads, dim, positions, cos, sin, half, begin, end);     \
        });                                                                                       \
    }                                                                                             \
    extern "C" void manta_rms_norm_##name(const void* x, int64_t stride, int64_t outer,           \
                                          int64_t inner, int64_t n, const void* w, float eps,     \
                                          void* y, int threads) {                                 \
        parallel_for(threads, outer, grain_of(outer, inner * n, threads),                         \
                     [&](int64_t begin, int64_t end) {                                            \
                         for (int64_t r = begin; r < end; r++)                                    \
                             for (int64_t i = 0; i < inner; i++)                                  \
                                 rms_row<E>((const E::T*)x + r * stride + i * n, (const E::T*)w,  \
                                            (E::T*)y + (r * inner + i) * n, n, eps);              \
                     });                                                                          \
    }                                                                                             \
    extern "C" void manta_layer_norm_##name(const void* x, int64_t stride, int64_t rows,          \
                                            int64_t n, const void* w, const void* b, float eps,   \
                                            void* y, int threads) {                               \
        parallel_for(threads, rows, grain_of(rows, n, threads), [&](int64_t begin, int64_t end) { \
            for (int64_t r = begin; r < end; r++)                                                 \
                layer_row<E>((const E::T*)x + r * stride, (const E::T*)w, (const E::T*)b,         \
                             (E::T*)y + r * n, n, eps);                                           \
        });                                                                                       \
    }                                                                                             \
    extern "C" void manta_silu_mul_##name(const void* x, int64_t stride, int64_t rows, int64_t n, \
                                          void* y, int threads) {                                 \
        parallel_for(threads, rows, grain_of(rows, n, threads), [&](int64_t begin, int64_t end) { \
            for (int64_t r = begin; r < end; r++)                                                 \
                silu_row<E>((const E::T*)x + r * stride, (const E::T*)x + r * stride + n,         \
                            (E::T*)y + r * n, n);                                                 \
        });                                                                                       \
    }                                                                                             \
    extern "C" void manta_mask_rows_##name(void* x, int64_t stride, int64_t n, int64_t rows,     \
                                           const int32_t* at, const uint32_t* masks,              \
                                           int64_t words, int threads) {                          \
        parallel_for(threads, rows, grain_of(rows, n, threads), [&](int64_t begin, int64_t end) { \
            for (int64_t r = begin; r < end; r++)                                                 \
                mask_row<E>((E::T*)x + at[r] * stride, masks + r * words, n);                     \
        });                                                                                       \
    }                                                                                             \
    extern "C" void manta_argmax_lse_##name(const void* x, int64_t rows, int64_t stride,          \
                                            int64_t n, int64_t* index, float* lse,                \
                                            uint8_t* finite, int threads) {                       \
        argmax_lse<E>((const E::T*)x, rows, stride, n, index, lse, finite, threads);              \
    }

FOR_TYPE(bf16, BF16)
FOR_TYPE(fp32, F32)

extern "C" void manta_delta(const DeltaStep* s, const float* qkv, const float* rest, float* state,
                            float* y, int threads) {
    parallel_for(threads, int64_t(s->rows) * s->keys, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            delta_head(*s, int(i / s->keys), int(i % s->keys), qkv, rest, state, y);
    });
}

extern "C" void manta_mamba2(const Mamba2Step* s, const float* xbc, const float* rest,
                             float* state, float* y, int threads) {
    parallel_for(threads, int64_t(s->rows) * s->groups, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            mamba2_group(*s, int(i / s->groups), int(i % s->groups), xbc, rest, state, y);
    });
}

// group points to a GroupMemory whose fields the caller keeps between calls.
extern "C" void manta_group_reduce_fp32(void* group, float* x, int64_t n) {
    group_reduce(*static_cast<GroupMemory*>(group), x, n);
}
extern "C" void manta_group_reduce_bf16(void* group, uint16_t* x, int64_t n) {
    group_reduce(*static_cast<GroupMemory*>(group), x, n);
}
extern "C" void manta_group_gather(void* group, const uint8_t* x, int64_t rows, int64_t width,
                                   uint8_t* out) {
    group_gather(*static_cast<GroupMemory*>(group), x, rows, width, out);
}
extern "C" void manta_group_broadcast(void* group, uint8_t* x, int64_t bytes) {
    group_broadcast(*static_cast<GroupMemory*>(group), x, bytes);
}

extern "C" void manta_init(void* gomp) { gomp_parallel = reinterpret_cast<ParallelFn>(gomp); }

extern "C" int manta_has_gemm() { return HAS_GEMM; }

extern "C" void manta_gemm_pack(const void* w, int64_t N, int64_t K, void* out, int threads) {
    gemm_pack((const uint16_t*)w, N, K, (uint16_t*)out, threads);
}

extern "C" void manta_gemm(const void* x, int64_t x_stride, int64_t M, const void* w, int64_t N,
                           int64_t K, const void* bias, const void* residual, int64_t r_stride,
                           int relu, void* y, int threads) {
    gemm((const uint16_t*)x, x_stride, M, NumbersTile{(const uint16_t*)w, K}, N, K,
         (const uint16_t*)bias, (const uint16_t*)residual, r_stride, relu, (uint16_t*)y, threads);
}

extern "C" void manta_gemm_codes(const void* x, int64_t x_stride, int64_t M, const void* codes,
                                 const void* offsets, const void* scales, const void* numbers,
                                 int64_t group, int64_t start, int64_t groups, int64_t N, int64_t K,
                                 const void* bias, const void* residual, int64_t r_stride, int relu,
                                 void* y, int threads) {
    const CodesTile tile{(const uint8_t*)codes, (const uint8_t*)offsets, (const float*)scales,
                         (const uint16_t*)numbers, K, group, start, groups};
    gemm((const uint16_t*)x, x_stride, M, tile, N, K, (const uint16_t*)bias,
         (const uint16_t*)residual, r_stride, relu, (uint16_t*)y, threads);
}
