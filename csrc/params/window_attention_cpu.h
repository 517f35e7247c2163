// The functions that run the CPU backend's window attention kernels.
#pragma once

#include "window_attention.h"

namespace swinkernels::cpu {

// Runs body(context, begin, end) over [0, tasks) on the caller's thread pool.
using ParallelFor = void (*)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// Returns the instruction set that the kernels use on this machine: "avx512", "avx2" or "baseline". This is the best
// supported one, unless the environment variable SWINKERNELS_CPU_ISA, which is read once, names another. This function
// and those below throw std::invalid_argument if the machine does not support the named instruction set.
const char* instruction_set();

void window_attention_forward(const WindowAttentionForwardParams& params, ParallelFor parallel_for);

int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
void window_attention_backward(const WindowAttentionBackwardParams& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
