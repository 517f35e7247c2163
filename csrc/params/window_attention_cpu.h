// The functions that run the CPU backend's window attention kernels.
#pragma once

#include "cpu.h"
#include "window_attention.h"

namespace swinkernels::cpu {

void window_attention_forward(const WindowAttentionForwardParams& params, ParallelFor parallel_for);

int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
void window_attention_backward(const WindowAttentionBackwardParams& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
