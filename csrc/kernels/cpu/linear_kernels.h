// The interface through which linear.cpp calls the Linear layer kernels of one instruction set.
#pragma once

#include <cstdint>

#include "params/linear_cpu.h"

namespace swinkernels::cpu {

// A call is divided into tasks, which no result depends on. Every thread calls a kernel once; the kernel takes the next
// task from the counter `next` until there is none, so that a slow thread does not delay the others.
struct LinearKernels {
  int64_t (*linear_tasks)(const LinearParams&);
  int64_t (*mlp_tasks)(const MlpParams&);
  // Return the number of bytes of scratch memory for one call. The memory must be 64-byte aligned.
  int64_t (*linear_scratch_bytes)(const LinearParams&);
  int64_t (*mlp_scratch_bytes)(const MlpParams&);
  void (*linear)(const LinearParams&, int64_t* next, void* scratch);
  void (*mlp)(const MlpParams&, int64_t* next, void* scratch);
};

extern const LinearKernels kBaselineLinearKernels;
#ifdef __x86_64__
extern const LinearKernels kAvx2LinearKernels;
extern const LinearKernels kAvx512LinearKernels;
#endif

}  // namespace swinkernels::cpu
