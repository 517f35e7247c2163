// The interface through which window_attention.cpp calls the window attention kernels of one instruction set.
#pragma once

#include <cstdint>

#include "params/window_attention_cpu.h"

namespace swinkernels::cpu {

// Returns the factor of a head's q k^T: the scale or, in v2, exp(min(logit_scale, ln 100)).
float score_factor(const WindowAttentionForwardParams&, int64_t head);

// The division of the backward pass into chunks, which does not depend on the number of threads. A chunk consists of
// several windows of one bias type, for one head; the index of a chunk is window_chunk * num_heads + head. Each chunk
// sums its own parameter gradients.
struct BackwardPartition {
  int64_t windows_per_type;  // in the whole batch; window_chunk = type * chunks_per_type + chunk within the type
  int64_t windows_per_chunk;
  int64_t chunks_per_type;
  int64_t window_chunks;
  int64_t table_rows;
  int64_t workspace_bytes;  // bytes of all arrays below
  // The arrays of gradients that are not needed are null.
  float* dbias_table;   // (window_chunks, num_heads, table_rows)
  float* dbias;         // (window_chunks, num_heads, N, M)
  float* daxis_tables;  // (window_chunks, num_heads, rows of all axes, head_dim)
  float* dlogit_scale;  // (window_chunks, num_heads), not yet multiplied by score_factor
  float* dpad_kv;       // (window_chunks, num_heads, 2, head_dim)
  float* dkv;           // (windows of the batch, num_heads, 2, M, head_dim), if windows share keys
};

struct WindowAttentionKernels {
  // Return the number of bytes of scratch memory for one call of forward or backward. The memory must be 64-byte
  // aligned.
  int64_t (*forward_scratch_bytes)(const WindowAttentionForwardParams&);
  int64_t (*backward_scratch_bytes)(const WindowAttentionBackwardParams&);
  // Runs tasks [begin, end), where task = window * num_heads + head.
  void (*forward)(const WindowAttentionForwardParams&, int64_t begin, int64_t end, void* scratch);
  // Runs chunks [begin, end).
  void (*backward)(const WindowAttentionBackwardParams&, const BackwardPartition&, int64_t begin, int64_t end,
                   void* scratch);
  // Sums dkv into dk and dv after backward, if the partition has dkv. Runs tasks [begin, end), where task = window *
  // num_heads + head.
  void (*sum_key_gradients)(const WindowAttentionBackwardParams&, const BackwardPartition&, int64_t begin, int64_t end,
                            void* scratch);
};

extern const WindowAttentionKernels kBaselineKernels;
#ifdef __x86_64__
extern const WindowAttentionKernels kAvx2Kernels;
extern const WindowAttentionKernels kAvx512Kernels;
#endif

}  // namespace swinkernels::cpu
