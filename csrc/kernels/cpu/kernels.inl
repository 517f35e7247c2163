// The table of all kernels of one instruction set; see simd.inl for how this is compiled.
#define SWINKERNELS_UNITS Float32Units
#include "attention_half.inl"

namespace swinkernels::cpu {

const Kernels SWINKERNELS_KERNELS = {SWINKERNELS_ISA::kWindowAttentionKernels, SWINKERNELS_ISA::kLayerKernels};

}  // namespace swinkernels::cpu
