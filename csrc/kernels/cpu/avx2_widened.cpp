// The bfloat16 kernels of Linear layers for x86-64 CPUs with AVX2, FMA and F16C, but without products of bfloat16.
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

// The pragma covers the rest of the file, because templates are compiled for the target in effect at the end of the
// file.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define SWINKERNELS_ISA avx2_widened
#define SWINKERNELS_KERNELS kAvx2WidenedKernels
#define SWINKERNELS_LANES 8
#define SWINKERNELS_AVX
#define SWINKERNELS_UNITS WidenedUnits
#include "bfloat16.inl"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
