// Window attention for any CPU, with vectors of 4 floats, which every x86-64 and aarch64 CPU supports.
#include <cstdint>

#include "window_attention_kernels.h"

#define SWINKERNELS_ISA baseline
#define SWINKERNELS_KERNELS kBaselineKernels
#define SWINKERNELS_LANES 4
#include "window_attention.inl"
