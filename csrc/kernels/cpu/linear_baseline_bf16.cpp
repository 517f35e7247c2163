// Linear layers in bfloat16 for any CPU, with vectors of 4 floats, which every x86-64 and aarch64 CPU supports.
#include <cstdint>

#include "linear_kernels.h"

#define SWINKERNELS_ISA baseline_bf16
#define SWINKERNELS_KERNELS kBaselineBFloat16LinearKernels
#define SWINKERNELS_LANES 4
#define SWINKERNELS_LINEAR_FORMAT BFloat16
#include "linear.inl"
