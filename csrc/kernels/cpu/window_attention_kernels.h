// The window attention kernels of one instruction set, as window_attention.cpp calls them.
#pragma once

#include <cstdint>

#include "params/window_attention_cpu.h"

namespace swinkernels::cpu {

// How the backward pass is cut up, the same for any number of threads. A chunk is some windows of one head; chunk number
// = window chunk * num_heads + head. The bias gradient of a window chunk is summed apart.
struct BackwardPartition {
  int64_t window_chunks;
  int64_t windows_per_chunk;
  int64_t table_rows;
  float* dbias_table;  // (window_chunks, num_heads, table_rows), or null if not wanted
  float* dpad_kv;      // (window_chunks, num_heads, 2, head_dim), or null if not wanted
};

struct WindowAttentionKernels {
  const char* instruction_set;
  // Bytes of scratch memory, 64-byte aligned, that one call of forward or backward needs.
  int64_t (*forward_scratch_bytes)(const WindowAttentionForwardParams&);
  int64_t (*backward_scratch_bytes)(const WindowAttentionBackwardParams&);
  // Tasks [begin, end) of window * num_heads + head.
  void (*forward)(const WindowAttentionForwardParams&, int64_t begin, int64_t end, void* scratch);
  // Chunks [begin, end).
  void (*backward)(const WindowAttentionBackwardParams&, const BackwardPartition&, int64_t begin, int64_t end,
                   void* scratch);
};

extern const WindowAttentionKernels kBaselineKernels;
#ifdef __x86_64__
extern const WindowAttentionKernels kAvx2Kernels;
extern const WindowAttentionKernels kAvx512Kernels;
#endif

}  // namespace swinkernels::cpu
