// The bias of one head, which is a column of a table or a dense matrix.
#pragma once

#include <cmath>
#include <cstdint>

#include "arguments.cuh"

namespace swinkernels::cuda {

// The bias that is added to a block's scores. There is no bias if data is null.
struct Bias {
  const float* data;
  int32_t stride;                          // between the entries of a table's column; between the rows of a dense bias
  const int32_t *query_index, *key_index;  // of every token, for a table (WindowLayout); null for a dense bias
  int32_t middle;                          // table_middle (WindowLayout)
};

// Returns the bias of a block's unit in global memory. `tokens` has the query_index and the key_index of every token.
template <int kMaps, class Tokens>
__device__ __forceinline__ Bias global_bias(const WindowArguments<kMaps>& args, const BlockShare& share,
                                            const Tokens& tokens) {
  if (args.dense_bias != nullptr) {
    const int64_t unit = static_cast<int64_t>(share.type) * args.num_heads + share.head;
    return {args.dense_bias + unit * args.num_tokens * args.num_tokens, args.num_tokens, nullptr, nullptr, 0};
  }
  const float* column = args.bias_table == nullptr ? nullptr : args.table_column(share.type, share.head);
  return {column, args.table_columns(), tokens.query_index, tokens.key_index, args.layout.table_middle};
}

// Like global_bias, but copies the column of a table to `table`, in shared memory, if there is enough space. The caller
// synchronises.
template <class Traits, int kMaps, class Tokens>
__device__ __forceinline__ Bias staged_bias(const WindowArguments<kMaps>& args, const BlockShare& share, float* table,
                                            const Tokens& tokens) {
  Bias bias = global_bias(args, share, tokens);
  const int entries = args.layout.table_entries;
  if (args.bias_table == nullptr || entries > Traits::kSharedTableEntries) return bias;
  for (int i = threadIdx.x; i < entries; i += Traits::kThreads) {
    table[i] = bias.data[static_cast<int64_t>(i) * bias.stride];
  }
  bias.data = table;
  bias.stride = 1;
  return bias;
}

// Loads the bias of 16 queries from row0 on and a block of keys from col0 on, times log2(e), as an accumulator
// fragment. For keys past the window, the bias is minus infinity, which removes them from the softmax. If the bias is a
// table, query_index[0] and key_index[0] belong to tokens first_row and first_col.
template <int kTiles>
__device__ __forceinline__ void load_bias(float (&fragment)[kTiles][4], const Bias& bias, int row0, int col0,
                                          int num_tokens, int first_row = 0, int first_col = 0) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Queries past the window use the bias of the last query. Their scores are never read.
  const int rows[2] = {min(row0 + g, num_tokens - 1), min(row0 + g + 8, num_tokens - 1)};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) fragment[j][e] = col0 + 8 * j + 2 * t + e % 2 < num_tokens ? 0.0f : -INFINITY;
  }
  if (bias.data == nullptr) return;
  if (bias.query_index == nullptr) {
    const float* const data[2] = {bias.data + static_cast<int64_t>(rows[0]) * bias.stride + col0 + 2 * t,
                                  bias.data + static_cast<int64_t>(rows[1]) * bias.stride + col0 + 2 * t};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (fragment[j][e] == 0.0f) fragment[j][e] = data[e / 2][8 * j + e % 2] * kLog2E;
      }
    }
    return;
  }
  const int row_index[2] = {bias.query_index[rows[0] - first_row] + bias.middle,
                            bias.query_index[rows[1] - first_row] + bias.middle};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = col0 + 8 * j + 2 * t + e;
      if (col >= num_tokens) continue;
      const int col_index = bias.key_index[col - first_col];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // The index fits into 32 bits, because window_attention.cu rejects larger tables.
        fragment[j][2 * half + e] = bias.data[(row_index[half] - col_index) * bias.stride] * kLog2E;
      }
    }
  }
}

}  // namespace swinkernels::cuda
