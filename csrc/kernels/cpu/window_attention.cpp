// The CPU backend of window attention: takes the best kernels that this machine runs, and cuts the work into tasks.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "params/window_attention_cpu.h"
#include "window_attention_kernels.h"

namespace swinkernels::cpu {
namespace {

// Best first.
std::vector<const WindowAttentionKernels*> supported_kernels() {
  std::vector<const WindowAttentionKernels*> kernels;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(&kAvx512Kernels);
  }
  if (avx2) kernels.push_back(&kAvx2Kernels);
#endif
  kernels.push_back(&kBaselineKernels);
  return kernels;
}

const WindowAttentionKernels& choose_kernels() {
  const auto supported = supported_kernels();
  const char* asked = std::getenv("SWINKERNELS_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return *supported.front();
  std::string names;
  for (const WindowAttentionKernels* kernels : supported) {
    if (std::string(asked) == kernels->instruction_set) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->instruction_set);
  }
  throw std::invalid_argument("SWINKERNELS_CPU_ISA must be an instruction set that this machine supports (" + names +
                              "), got " + asked);
}

const WindowAttentionKernels& kernels() {
  static const WindowAttentionKernels& chosen = choose_kernels();
  return chosen;
}

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
// Kept by each thread from call to call: fresh memory would cost page faults, which take longer than a small map does.
void* scratch(int64_t bytes) {
  thread_local std::unique_ptr<void, AlignedDelete> memory;
  thread_local int64_t capacity = 0;
  if (capacity < bytes) {
    memory.reset();
    capacity = 0;
    memory.reset(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64}));
    capacity = bytes;
  }
  return memory.get();
}

// Runs body(begin, end) over [0, tasks).
template <class Body>
void run(ParallelFor parallel_for, int64_t tasks, Body body) {
  parallel_for(
      tasks, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

int64_t product(const int32_t (&v)[3]) { return int64_t{1} * v[0] * v[1] * v[2]; }

BackwardPartition make_partition(const WindowAttentionBackwardParams& params) {
  const WindowAttentionForwardParams& p = params.forward;
  const int64_t windows = p.batch * product(p.geometry.num_windows);
  // Enough chunks for the threads of a large machine, but several windows each: a chunk writes out its bias gradient.
  constexpr int64_t kChunks = 128, kMinWindowChunks = 8, kMinWindows = 4;
  const int64_t most = std::max(kMinWindowChunks, kChunks / p.num_heads);
  BackwardPartition partition{};
  partition.windows_per_chunk = std::max(kMinWindows, (windows + most - 1) / most);
  partition.window_chunks = (windows + partition.windows_per_chunk - 1) / partition.windows_per_chunk;
  partition.table_rows = 1;
  for (int32_t t : p.geometry.table_window) partition.table_rows *= 2 * t - 1;
  auto* workspace = static_cast<float*>(params.workspace);
  if (params.dbias_table != nullptr) partition.dbias_table = workspace;
  if (params.dpad_qkv != nullptr) {
    const int64_t dbias = params.dbias_table == nullptr ? 0 : partition.window_chunks * p.num_heads;
    partition.dpad_kv = workspace + dbias * partition.table_rows;
  }
  return partition;
}

// sum[i * stride] = the sum of parts[i], of which there are `chunks`, `chunk_stride` apart; always in the same order.
void sum_chunks(const float* parts, int64_t chunks, int64_t chunk_stride, int64_t count, float* sum, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    float total = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += parts[chunk * chunk_stride + i];
    sum[i * stride] = total;
  }
}

}  // namespace

const char* instruction_set() { return kernels().instruction_set; }

void window_attention_forward(const WindowAttentionForwardParams& p, ParallelFor parallel_for) {
  const int64_t tasks = p.batch * product(p.geometry.num_windows) * p.num_heads;
  if (tasks == 0) return;
  const int64_t bytes = kernels().forward_scratch_bytes(p);
  run(parallel_for, tasks, [&](int64_t begin, int64_t end) { kernels().forward(p, begin, end, scratch(bytes)); });
}

int64_t window_attention_backward_workspace_bytes(const WindowAttentionBackwardParams& params) {
  const BackwardPartition partition = make_partition(params);
  const int64_t dbias = params.dbias_table == nullptr ? 0 : partition.table_rows;
  const int64_t dpad = params.dpad_qkv == nullptr ? 0 : int64_t{2} * params.forward.head_dim;
  return partition.window_chunks * params.forward.num_heads * (dbias + dpad) * static_cast<int64_t>(sizeof(float));
}

void window_attention_backward(const WindowAttentionBackwardParams& params, ParallelFor parallel_for) {
  const WindowAttentionForwardParams& p = params.forward;
  const BackwardPartition partition = make_partition(params);
  const int64_t heads = p.num_heads, dim = p.head_dim, rows = partition.table_rows;
  if (partition.window_chunks > 0) {
    const int64_t bytes = kernels().backward_scratch_bytes(params);
    run(parallel_for, partition.window_chunks * heads,
        [&](int64_t begin, int64_t end) { kernels().backward(params, partition, begin, end, scratch(bytes)); });
  }
  if (params.dbias_table == nullptr && params.dpad_qkv == nullptr) return;
  run(parallel_for, heads, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      if (params.dbias_table != nullptr) {
        sum_chunks(partition.dbias_table + head * rows, partition.window_chunks, heads * rows, rows,
                   params.dbias_table + head, heads);
      }
      if (params.dpad_qkv != nullptr) {
        float* dpad = params.dpad_qkv + head * dim;  // of q; a pad query has no gradient
        std::fill(dpad, dpad + dim, 0.0f);
        for (int64_t part = 0; part < 2; ++part) {
          sum_chunks(partition.dpad_kv + (head * 2 + part) * dim, partition.window_chunks, heads * 2 * dim, dim,
                     dpad + (part + 1) * heads * dim, 1);
        }
      }
    }
  });
}

}  // namespace swinkernels::cpu
