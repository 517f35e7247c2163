// The table of all kernels of one instruction set; see simd.inl for how this is compiled.
#include "attention_half.inl"

namespace swinkernels::cpu {

const Kernels SWINKERNELS_KERNELS = {
    {SWINKERNELS_ISA::forward_scratch_bytes, SWINKERNELS_ISA::backward_scratch_bytes, SWINKERNELS_ISA::forward,
     SWINKERNELS_ISA::backward, SWINKERNELS_ISA::sum_key_gradients},
    {SWINKERNELS_ISA::linear_tasks, SWINKERNELS_ISA::linear_scratch_bytes, SWINKERNELS_ISA::linear},
    {SWINKERNELS_ISA::mlp_tasks, SWINKERNELS_ISA::mlp_scratch_bytes, SWINKERNELS_ISA::mlp},
    {SWINKERNELS_ISA::norm_tasks, SWINKERNELS_ISA::norm_scratch_bytes, SWINKERNELS_ISA::norm},
    {SWINKERNELS_ISA::attention_half_tasks, SWINKERNELS_ISA::attention_half_scratch_bytes,
     SWINKERNELS_ISA::attention_half}};

}  // namespace swinkernels::cpu
