// Linear layers in float32, and the halves of a block that consist of them, on a CPU.
#include "kernels.h"
#include "params/attention_half_cpu.h"
#include "params/linear_cpu.h"

namespace swinkernels::cpu {

void linear_forward(const LinearParams& p, ParallelFor parallel_for) { run_tasks(kernels().linear, p, parallel_for); }
void mlp_forward(const MlpParams& p, ParallelFor parallel_for) { run_tasks(kernels().mlp, p, parallel_for); }
void attention_half_forward(const AttentionHalfParams& p, ParallelFor parallel_for) {
  run_tasks(kernels().attention_half, p, parallel_for);
}

}  // namespace swinkernels::cpu
