// The kernels of one instruction set, and the choice of the set.
#pragma once

#include <cstdint>

#include "machine.h"
#include "params/attention_half_cpu.h"
#include "params/linear_cpu.h"
#include "params/position_bias_cpu.h"
#include "params/window_attention_cpu.h"

namespace swinkernels::cpu {

inline int64_t product(const int32_t (&v)[3]) { return int64_t{1} * v[0] * v[1] * v[2]; }

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

// A call of the kernels below is divided into tasks, which no result depends on. Every thread calls a kernel once; the
// kernel takes the next task from the counter `next` until there is none, so that a slow thread does not delay the
// others. scratch_bytes returns the number of bytes of scratch memory for one call. The memory must be 64-byte aligned.
template <class Params>
struct TaskKernel {
  int64_t (*tasks)(const Params&);
  int64_t (*scratch_bytes)(const Params&);
  void (*run)(const Params&, int64_t* next, void* scratch);
};

// The kernels of Linear layers and of what is computed with them, for one element type; uint16_t stands for bfloat16.
template <class Element>
struct LayerKernels {
  TaskKernel<LinearParams<Element>> linear;
  TaskKernel<MlpParams<Element>> mlp;
  TaskKernel<NormParams<Element>> norm;
  TaskKernel<AttentionHalfParams<Element>> attention_half;
  TaskKernel<PositionBiasParams<Element>> position_bias;
  // With fewer rows of an MLP, or windows of an attention half, per thread, computing one layer after the other is faster
  // than a single pass.
  int64_t rows_per_thread, windows_per_thread;
};

struct Kernels {
  WindowAttentionKernels window_attention;
  LayerKernels<float> layers;
};

extern const Kernels kBaselineKernels;
extern const LayerKernels<uint16_t> kBaselineBFloat16Kernels;
extern const LayerKernels<uint16_t> kEmulatedAmxKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const LayerKernels<uint16_t> kAvx2WidenedKernels;
extern const LayerKernels<uint16_t> kAvx512WidenedKernels;
extern const LayerKernels<uint16_t> kAvx512BFloat16Kernels;
extern const LayerKernels<uint16_t> kAmxKernels;
#endif

// Return the kernels of this machine's instruction set.
const Kernels& kernels();
template <class Element>
const LayerKernels<Element>& layer_kernels();
template <>
const LayerKernels<float>& layer_kernels();
template <>
const LayerKernels<uint16_t>& layer_kernels();

// Runs all tasks of a call.
template <class Params>
void run_tasks(const TaskKernel<Params>& kernel, const Params& p, ParallelFor parallel_for) {
  const int64_t bytes = kernel.scratch_bytes(p);
  int64_t next = 0;
  run(parallel_for, kernel.tasks(p), [&](int64_t, int64_t) { kernel.run(p, &next, scratch(bytes)); });
}

}  // namespace swinkernels::cpu
