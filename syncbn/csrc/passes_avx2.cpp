// The passes for x86-64 processors with AVX2 (Haswell, Zen and later).
#if defined(__x86_64__)

// Everything below is compiled for these instructions, whatever the command line says; nothing above is.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2")
#endif

#define SYNCBN_AVX2
#define SYNCBN_VECTOR_BYTES 32
#define SYNCBN_KERNELS avx2_kernels
#include "passes.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
