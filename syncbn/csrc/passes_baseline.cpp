// The passes for every processor: what the compiler's default target has, 128-bit vectors on x86-64 and AArch64.
#define SYNCBN_VECTOR_BYTES 16
#define SYNCBN_KERNELS baseline_kernels
#include "passes.h"
