// Launch prototypes of the CPU backend.
#pragma once

#include "window_attention.h"

namespace swinkernels::cpu {

// Runs body(context, begin, end) over [0, tasks) on the caller's thread pool.
using ParallelFor = void (*)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// Of the kernels that run on this machine: "avx512", "avx2" or "baseline". The best that it supports, or the one that the
// environment variable SWINKERNELS_CPU_ISA names, which is read once; std::invalid_argument, here and below, if that is
// not supported.
const char* instruction_set();

void window_attention_forward(const WindowAttentionForwardParams& params, ParallelFor parallel_for);

int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params);
void window_attention_backward(const WindowAttentionBackwardParams& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
