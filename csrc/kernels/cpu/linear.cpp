// Linear layers on a CPU. Chooses the kernels for the dtype and this machine's instruction set.
#include <cstdint>

#include "linear_kernels.h"
#include "machine.h"
#include "params/linear_cpu.h"

namespace swinkernels::cpu {
namespace {

const LinearKernels& kernels(DType dtype) {
  const InstructionSet set = chosen_instruction_set();
  if (dtype == DType::kBFloat16) {
#ifdef __x86_64__
    if (set == InstructionSet::kAvx512BFloat16) return kAvx512BFloat16LinearKernels;
#endif
    return kBaselineBFloat16LinearKernels;  // slow: without products of bfloat16, torch's functions are faster
  }
  switch (set) {
#ifdef __x86_64__
    case InstructionSet::kAvx512BFloat16:
    case InstructionSet::kAvx512:
      return kAvx512LinearKernels;
    case InstructionSet::kAvx2:
      return kAvx2LinearKernels;
#endif
    default:
      return kBaselineLinearKernels;
  }
}

template <class Params>
void forward(const Params& p, int64_t tasks, int64_t bytes, void (*kernel)(const Params&, int64_t*, void*),
             ParallelFor parallel_for) {
  int64_t next = 0;
  run(parallel_for, tasks, [&](int64_t, int64_t) { kernel(p, &next, scratch(bytes)); });
}

}  // namespace

void linear_forward(const LinearParams& p, ParallelFor parallel_for) {
  const LinearKernels& k = kernels(p.dtype);
  forward(p, k.linear_tasks(p), k.linear_scratch_bytes(p), k.linear, parallel_for);
}

void mlp_forward(const MlpParams& p, ParallelFor parallel_for) {
  const LinearKernels& k = kernels(p.dtype);
  forward(p, k.mlp_tasks(p), k.mlp_scratch_bytes(p), k.mlp, parallel_for);
}

}  // namespace swinkernels::cpu
