// The bfloat16 kernels of Linear layers for x86-64 CPUs with AMX (TILE and BF16) and AVX-512 (F, BW, DQ, VL and BF16).
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

// The pragma covers the rest of the file, because templates are compiled for the target in effect at the end of the
// file.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define SWINKERNELS_ISA amx
#define SWINKERNELS_KERNELS kAmxKernels
#define SWINKERNELS_LANES 16
#define SWINKERNELS_AVX
#define SWINKERNELS_BF16
#define SWINKERNELS_TILES
#define SWINKERNELS_AMX
#define SWINKERNELS_UNITS TiledUnits
#include "bfloat16.inl"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
