// Linear layers in float32 on a CPU. Chooses the kernels for this machine's instruction set.
#include <cstdint>

#include "linear_kernels.h"
#include "machine.h"
#include "params/linear_cpu.h"

namespace swinkernels::cpu {
namespace {

const LinearKernels& kernels() {
  switch (chosen_instruction_set()) {
#ifdef __x86_64__
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
  const LinearKernels& k = kernels();
  forward(p, k.linear_tasks(p), k.linear_scratch_bytes(p), k.linear, parallel_for);
}

void mlp_forward(const MlpParams& p, ParallelFor parallel_for) {
  const LinearKernels& k = kernels();
  forward(p, k.mlp_tasks(p), k.mlp_scratch_bytes(p), k.mlp, parallel_for);
}

}  // namespace swinkernels::cpu
