// The function that runs the attention half of a block on a CPU, and its arguments. All data but the tables is float32,
// or bfloat16 in the bits of uint16_t; channels and head_dim must then be even.
#pragma once

#include "linear_cpu.h"
#include "window_attention.h"

namespace swinkernels::cpu {

// out = x + post_norm(proj(attention(qkv(norm(x))))), without x + unless `residual`. The rows of pad tokens are zeros
// before qkv, so their q, k and v are the layers' biases.
template <class Element>
struct AttentionHalfParams {
  // Everything but the maps, lse and pad_qkv. There are no axis_tables, no key margin and no dropout.
  WindowAttentionForwardParams attention;
  ConstTokenMap x;  // (B, D, H, W, channels); contiguous if by_layers
  TokenMap out;     // contiguous
  int64_t channels;
  bool residual;
  RowNorm<Element> norm, post_norm;
  LinearLayer<Element> qkv[3];  // num_heads * head_dim rows each, with biases that follow one another, or none
  LinearLayer<Element> proj;
  int64_t threads;  // the number of threads that the work should keep busy
  bool by_layers;   // compute one layer for all rows of some images before the next one; see is_faster_by_layers
};

// Returns true if a call should compute its layers one after the other.
template <class Element>
bool is_faster_by_layers(const AttentionHalfParams<Element>& params);

template <class Element>
void attention_half_forward(const AttentionHalfParams<Element>& params, ParallelFor parallel_for);

}  // namespace swinkernels::cpu
