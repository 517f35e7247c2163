// The table of the bfloat16 kernels of one instruction set; see simd.inl for how this is compiled.
#include "attention_half.inl"

namespace swinkernels::cpu {

const LayerKernels<uint16_t> SWINKERNELS_KERNELS = SWINKERNELS_ISA::kLayerKernels;

}  // namespace swinkernels::cpu
