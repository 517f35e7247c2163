// The function that computes v2's table of the continuous position bias on a CPU, and its arguments.
#pragma once

#include "linear_cpu.h"

namespace swinkernels::cpu {

// table = 16 sigmoid(fc2(relu(fc1(offsets)))), (rows, fc2.out_features). The rows of offsets are contiguous, and fc2 has
// no bias.
template <class Element>
struct PositionBiasParams {
  const Element* offsets;
  float* table;
  int64_t rows;
  LinearLayer<Element> fc1, fc2;
};

template <class Element>
void position_bias_forward(const PositionBiasParams<Element>& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
