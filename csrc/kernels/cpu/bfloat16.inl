// The table of the bfloat16 kernels of one instruction set; see simd.inl for how this is compiled.
#ifndef SWINKERNELS_UNITS
#define SWINKERNELS_UNITS BFloat16Units
#endif
#include "attention_half.inl"

namespace swinkernels::cpu {

const LayerKernels<uint16_t> SWINKERNELS_KERNELS = SWINKERNELS_ISA::kLayerKernels;

}  // namespace swinkernels::cpu
