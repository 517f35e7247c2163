// The bfloat16 kernels of Linear layers for any CPU, with vectors of 4 floats. They are slower than float32 kernels, but
// give a result everywhere.
#include <cstdint>

#include "kernels.h"

#define SWINKERNELS_ISA baseline_bf16
#define SWINKERNELS_KERNELS kBaselineBFloat16Kernels
#define SWINKERNELS_LANES 4
#define SWINKERNELS_UNITS BFloat16Units
#include "bfloat16.inl"
