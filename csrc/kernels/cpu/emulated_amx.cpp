// The bfloat16 kernels of Linear layers for AMX, with arrays in place of tile registers, so that tests on any machine run
// the code that multiplies tiles. No call chooses these slow kernels unless SWINKERNELS_CPU_ISA names them.
#include <cstdint>

#include "kernels.h"

#ifndef __clang__
#pragma GCC diagnostic ignored "-Wpsabi"  // no function with vectors of 64 bytes is called from another file
#endif
#define SWINKERNELS_ISA emulated_amx
#define SWINKERNELS_KERNELS kEmulatedAmxKernels
#define SWINKERNELS_LANES 16
#define SWINKERNELS_TILES
#define SWINKERNELS_UNITS TiledUnits
#include "bfloat16.inl"
