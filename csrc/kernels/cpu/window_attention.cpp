// The CPU backend of window attention: divides the work into tasks.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "params/window_attention_cpu.h"

namespace swinkernels::cpu {
namespace {

// ln 100, to which v2's logit_scale is clamped.
constexpr double kMaxLogitScale = 4.605170185988092;

int64_t key_volume(const WindowGeometry& g) {
  int64_t keys = 1;
  for (int axis = 0; axis < 3; ++axis) keys *= g.window[axis] + 2 * g.key_margin[axis];
  return keys;
}

bool windows_overlap(const WindowGeometry& g) { return key_volume(g) > product(g.window); }

// Returns N * M, the number of scores of a window.
int64_t scores_of_window(const WindowAttentionForwardParams& p) {
  return product(p.geometry.window) * key_volume(p.geometry);
}

int64_t axis_table_rows(const WindowAttentionForwardParams& p) {
  return int64_t{p.axis_rows[0]} + p.axis_rows[1] + p.axis_rows[2];
}

BackwardPartition make_partition(const WindowAttentionBackwardParams& params) {
  const WindowAttentionForwardParams& p = params.forward;
  // There are enough chunks for the threads of a large machine, but each chunk has several windows, because it writes a
  // partial bias gradient. With a dense bias, all partial gradients together take at most 64 MiB, unless a single
  // partial gradient per bias type and head takes more.
  constexpr int64_t kChunks = 128, kMinWindowChunks = 8, kMinWindows = 4, kMaxDenseElements = 1 << 24;
  const int64_t types = p.bias_types, dense = p.num_heads * scores_of_window(p);
  int64_t most = std::max(kMinWindowChunks, kChunks / p.num_heads);
  if (params.dbias != nullptr) most = std::min(most, kMaxDenseElements / dense);
  most = std::max<int64_t>(most / types, 1);
  BackwardPartition partition{};
  partition.windows_per_type = p.batch * product(p.geometry.num_windows) / types;
  partition.windows_per_chunk = std::max(kMinWindows, (partition.windows_per_type + most - 1) / most);
  partition.chunks_per_type =
      (partition.windows_per_type + partition.windows_per_chunk - 1) / partition.windows_per_chunk;
  partition.window_chunks = types * partition.chunks_per_type;
  partition.table_rows = 1;
  const bool overlap = windows_overlap(p.geometry);
  for (int axis = 0; axis < 3; ++axis) {
    const WindowGeometry& g = p.geometry;
    partition.table_rows *= g.table_pairs[axis] ? g.window[axis] * g.window[axis]
                            : overlap           ? 2 * (g.window[axis] + g.key_margin[axis]) - 1
                                                : 2 * g.table_window[axis] - 1;
  }

  // Returns the next array in the workspace, or null if `wanted` is null. Without a workspace, only counts the bytes.
  const auto take = [&](const float* wanted, int64_t count_per_chunk) -> float* {
    if (wanted == nullptr) return nullptr;
    char* part = static_cast<char*>(params.workspace);
    if (part != nullptr) part += partition.workspace_bytes;
    partition.workspace_bytes += partition.window_chunks * count_per_chunk * static_cast<int64_t>(sizeof(float));
    return reinterpret_cast<float*>(part);
  };
  partition.dbias_table = take(params.dbias_table, p.num_heads * partition.table_rows);
  partition.dbias = take(params.dbias, dense);
  partition.daxis_tables = take(params.daxis_tables, p.num_heads * axis_table_rows(p) * p.head_dim);
  partition.dlogit_scale = take(params.dlogit_scale, p.num_heads);
  partition.dpad_kv = take(params.dpad_qkv, int64_t{2} * p.num_heads * p.head_dim);
  if (overlap) {
    const int64_t windows = partition.windows_per_type * types;
    char* part = static_cast<char*>(params.workspace);
    partition.dkv = part == nullptr ? nullptr : reinterpret_cast<float*>(part + partition.workspace_bytes);
    partition.workspace_bytes +=
        windows * p.num_heads * 2 * key_volume(p.geometry) * p.head_dim * static_cast<int64_t>(sizeof(float));
  }
  return partition;
}

// Sets sum[i * stride], for i < count, to the sum of parts[i + n * chunk_stride] over the chunks n, always in the same
// order.
void sum_chunks(const float* parts, int64_t chunks, int64_t chunk_stride, int64_t count, float* sum, int64_t stride) {
  constexpr int64_t kTile = 256;
  for (int64_t first = 0; first < count; first += kTile) {
    const int64_t tile = std::min(kTile, count - first);
    float totals[kTile] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* part = parts + chunk * chunk_stride + first;
      for (int64_t i = 0; i < tile; ++i) totals[i] += part[i];
    }
    for (int64_t i = 0; i < tile; ++i) sum[(first + i) * stride] = totals[i];
  }
}

}  // namespace

float score_factor(const WindowAttentionForwardParams& p, int64_t head) {
  if (p.logit_scale == nullptr) return p.scale;
  const double logit_scale = p.logit_scale[head];
  return static_cast<float>(std::exp(logit_scale > kMaxLogitScale ? kMaxLogitScale : logit_scale));  // NaN stays NaN
}

void window_attention_forward(const WindowAttentionForwardParams& p, ParallelFor parallel_for) {
  const int64_t tasks = p.batch * product(p.geometry.num_windows) * p.num_heads;
  if (tasks == 0) return;
  const int64_t bytes = kernels().window_attention.forward_scratch_bytes(p);
  run(parallel_for, tasks,
      [&](int64_t begin, int64_t end) { kernels().window_attention.forward(p, begin, end, scratch(bytes)); });
}

int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params) {
  return make_partition(params).workspace_bytes;
}

void window_attention_backward(const WindowAttentionBackwardParams& params, ParallelFor parallel_for) {
  const WindowAttentionForwardParams& p = params.forward;
  const BackwardPartition partition = make_partition(params);
  const int64_t heads = p.num_heads, dim = p.head_dim, rows = partition.table_rows, chunks = partition.window_chunks;
  if (chunks > 0) {
    const int64_t bytes = kernels().window_attention.backward_scratch_bytes(params);
    run(parallel_for, chunks * heads, [&](int64_t begin, int64_t end) {
      kernels().window_attention.backward(params, partition, begin, end, scratch(bytes));
    });
  }
  if (partition.dkv != nullptr) {
    const int64_t tasks = p.batch * product(p.geometry.num_windows) * heads;
    const int64_t bytes = (dim + 64) * static_cast<int64_t>(sizeof(float));  // a row, rounded up to whole vectors
    run(parallel_for, tasks, [&](int64_t begin, int64_t end) {
      kernels().window_attention.sum_key_gradients(params, partition, begin, end, scratch(bytes));
    });
  }
  if (params.dbias_table != nullptr || params.dlogit_scale != nullptr || params.dpad_qkv != nullptr) {
    run(parallel_for, heads, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        if (params.dbias_table != nullptr) {
          for (int64_t type = 0; type < p.bias_types; ++type) {
            const float* parts = partition.dbias_table + (type * partition.chunks_per_type * heads + head) * rows;
            sum_chunks(parts, partition.chunks_per_type, heads * rows, rows, params.dbias_table + type * heads + head,
                       p.bias_types * heads);
          }
        }
        if (params.dlogit_scale != nullptr) {
          float* sum = params.dlogit_scale + head;
          sum_chunks(partition.dlogit_scale + head, chunks, heads, 1, sum, 1);
          // Like torch.clamp, this passes the gradient through at the bound itself.
          *sum = p.logit_scale[head] <= kMaxLogitScale ? *sum * score_factor(p, head) : 0.0f;
        }
        if (params.dpad_qkv != nullptr) {
          float* dpad = params.dpad_qkv + head * dim;  // the gradient of q, which is zero for pad tokens
          std::fill(dpad, dpad + dim, 0.0f);
          for (int64_t part = 0; part < 2; ++part) {
            sum_chunks(partition.dpad_kv + (head * 2 + part) * dim, chunks, heads * 2 * dim, dim,
                       dpad + (part + 1) * heads * dim, 1);
          }
        }
      }
    });
  }
  if (params.daxis_tables != nullptr) {  // shared by the heads
    const int64_t axis_rows = axis_table_rows(p);
    run(parallel_for, axis_rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        sum_chunks(partition.daxis_tables + row * dim, chunks * heads, axis_rows * dim, dim,
                   params.daxis_tables + row * dim, 1);
      }
    });
  }
  if (params.dbias != nullptr) {
    const int64_t n2 = scores_of_window(p);
    run(parallel_for, p.bias_types * heads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first_part = i / heads * partition.chunks_per_type * heads + i % heads;
        sum_chunks(partition.dbias + first_part * n2, partition.chunks_per_type, heads * n2, n2, params.dbias + i * n2,
                   1);
      }
    });
  }
}

}  // namespace swinkernels::cpu
