// All kernels for any CPU, with vectors of 4 floats, which every x86-64 and aarch64 CPU supports.
#include <cstdint>

#include "kernels.h"

#define SWINKERNELS_ISA baseline
#define SWINKERNELS_KERNELS kBaselineKernels
#define SWINKERNELS_LANES 4
#include "kernels.inl"
