// The launch functions of the CPU backend.
#pragma once

#include "window_attention.h"

namespace swinkernels::cpu {

// Runs body(context, begin, end) over [0, tasks) on the caller's thread pool.
using ParallelFor = void (*)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// The instruction set of the kernels on this machine: "avx512", "avx2" or "baseline". It is the best supported one, or
// the one named by the environment variable SWINKERNELS_CPU_ISA, which is read once. This and the functions below throw
// std::invalid_argument if the machine does not support the named instruction set.
const char* instruction_set();

void window_attention_forward(const WindowAttentionForwardParams& params, ParallelFor parallel_for);

int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
void window_attention_backward(const WindowAttentionBackwardParams& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
