// The passes for x86-64 processors with AVX-512 (Skylake-SP, Zen 4 and later).
#if defined(__x86_64__)

// Everything below is compiled for these instructions, whatever the command line says; nothing above is.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc's own intrinsics (its bug 105593)

#define SYNCBN_AVX512
#define SYNCBN_VECTOR_BYTES 64
#define SYNCBN_KERNELS avx512_kernels
#include "passes.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
