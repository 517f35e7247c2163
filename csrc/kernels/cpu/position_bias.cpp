// The table of the continuous position bias on a CPU.
#include "params/position_bias_cpu.h"

#include "kernels.h"

namespace swinkernels::cpu {

template <class Element>
void position_bias_forward(const PositionBiasParams<Element>& p, ParallelFor parallel_for) {
  run_tasks(layer_kernels<Element>().position_bias, p, parallel_for);
}

template void position_bias_forward(const PositionBiasParams<float>&, ParallelFor);
template void position_bias_forward(const PositionBiasParams<uint16_t>&, ParallelFor);

}  // namespace swinkernels::cpu
