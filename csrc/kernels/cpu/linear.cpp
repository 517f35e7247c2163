// Linear layers, and the halves of a block that consist of them, on a CPU.
#include <algorithm>

#include "kernels.h"
#include "params/attention_half_cpu.h"
#include "params/linear_cpu.h"
#include "params/window_attention_cpu.h"

namespace swinkernels::cpu {
namespace {

// An MLP computes its layers for at most this many bytes of the hidden layer at a time, so that it stays in a cache.
constexpr int64_t kMostHiddenBytes = 8 << 20;
// In a single pass, an MLP divides its rows into blocks, and reads all weights for each. By layers, the columns are
// divided, too, so few rows use the threads better. The more channels x and the result have together, the fewer rows of
// them stay in the cache, and the more often the weights are read: on two threads of an AMD EPYC, a single pass took 0.86
// of the time of two layers for 2 * 1024 channels, and 1.5 for 2 * 1536.
constexpr int64_t kMostMlpChannels = 2048;
// In a single pass, a task of an attention half is a group of up to 256 rows, and it reads all weights. Layers read the
// weights less often if there are too few windows for full groups on all threads, or so many channels that a group has
// few rows.
constexpr int64_t kMostHalfChannels = 768;

template <class Element>
void mlp_by_layers(const MlpParams<Element>& p, ParallelFor parallel_for) {
  const int64_t hidden = p.fc1.out_features, out = p.fc2.out_features;
  const int64_t row = std::max<int64_t>(hidden, 1) * sizeof(Element);
  const int64_t step = std::max<int64_t>(kMostHiddenBytes / row / 64, 1) * 64;
  const MapMemory memory(std::min(step, p.rows) * row);
  auto* map = memory.as<Element>();
  for (int64_t first = 0; first < p.rows; first += step) {
    const int64_t rows = std::min(step, p.rows - first);
    const Element* residual = p.residual == nullptr ? nullptr : p.residual + first * out;
    linear_forward<Element>({p.x + first * p.x_stride, nullptr, map, rows, p.x_stride, p.norm, {}, p.fc1, p.activation},
                            parallel_for);
    linear_forward<Element>(
        {map, residual, p.out + first * out, rows, hidden, {}, p.post_norm, p.fc2, Activation::kNone}, parallel_for);
  }
}

// Returns true if the weights of q, k and v follow one another in memory, as in one layer.
template <class Element>
bool are_packed(const LinearLayer<Element> (&qkv)[3]) {
  const LinearLayer<Element>& q = qkv[0];
  for (int64_t i = 1; i < 3; ++i) {
    const Element* next = q.weight + i * q.out_features * q.row_stride;
    if (qkv[i].row_stride != q.row_stride || qkv[i].weight != next) return false;
  }
  return true;
}

// Returns the map (B, D, H, W, num_heads, head_dim) at `data`, whose tokens are `token` elements apart.
template <class Pointer>
TokenMapOf<Pointer> map_at(Pointer data, int64_t token, const WindowAttentionForwardParams& p) {
  const int32_t (&size)[3] = p.geometry.size;
  const int64_t row = size[2] * token, plane = size[1] * row;
  return {{data, size[0] * plane, {plane, row, token}}, p.head_dim};
}

// Computes the images [first, first + count) of a half with maps between the layers in `qkv`.
template <class Element>
void attend_by_layers(const AttentionHalfParams<Element>& p, int64_t first, int64_t count, Element* qkv,
                      ParallelFor parallel_for) {
  WindowAttentionForwardParams attention = p.attention;
  attention.batch = count;
  const int64_t width = int64_t{attention.num_heads} * attention.head_dim;
  const int64_t image = product(attention.geometry.size), rows = count * image;
  Element* const attended = qkv + 3 * rows * width;
  const auto* x = static_cast<const Element*>(p.x.data) + first * image * p.channels;
  auto* out = static_cast<Element*>(p.out.data) + first * image * p.channels;
  const bool packed = are_packed(p.qkv);
  ConstTokenMap* const maps[3] = {&attention.q, &attention.k, &attention.v};
  for (int64_t i = 0; i < 3; ++i) {
    Element* const part = qkv + i * (packed ? width : rows * width);
    *maps[i] = map_at<const void*>(part, packed ? 3 * width : width, attention);
    if (packed && i > 0) continue;
    LinearLayer<Element> layer = p.qkv[i];
    if (packed) layer.out_features = 3 * width;
    linear_forward<Element>({x, nullptr, part, rows, p.channels, p.norm, {}, layer, Activation::kNone}, parallel_for);
  }
  attention.out = map_at<void*>(attended, width, attention);
  attention.pad_qkv = p.qkv[0].bias;  // the biases of q, k and v follow one another
  window_attention_forward(attention, parallel_for);
  linear_forward<Element>(
      {attended, p.residual ? x : nullptr, out, rows, width, {}, p.post_norm, p.proj, Activation::kNone}, parallel_for);
}

// Computes as many images at a time as have maps that MapMemory keeps, but at least one.
template <class Element>
void attention_half_by_layers(const AttentionHalfParams<Element>& p, ParallelFor parallel_for) {
  const WindowAttentionForwardParams& a = p.attention;
  const int64_t width = int64_t{a.num_heads} * a.head_dim, image = product(a.geometry.size) * width;
  const int64_t bytes = 4 * image * static_cast<int64_t>(sizeof(Element));
  const int64_t step = std::min(std::max<int64_t>(MapMemory::kMostKept / bytes, 1), a.batch);
  const MapMemory memory(step * bytes);
  for (int64_t first = 0; first < a.batch; first += step) {
    attend_by_layers(p, first, std::min(step, a.batch - first), memory.as<Element>(), parallel_for);
  }
}

}  // namespace

template <class Element>
void linear_forward(const LinearParams<Element>& params, ParallelFor parallel_for) {
  LinearParams<Element> p = params;
  if (p.post_norm.given) p.residual = nullptr;
  run_tasks(layer_kernels<Element>().linear, p, parallel_for);
  if (!p.post_norm.given) return;
  const NormParams<Element> of_norm{p.out, params.residual, p.out, p.rows, p.layer.out_features, p.post_norm};
  run_tasks(layer_kernels<Element>().norm, of_norm, parallel_for);
}

template <class Element>
bool is_faster_by_layers(const MlpParams<Element>& p) {
  return p.rows < layer_kernels<Element>().rows_per_thread * p.threads ||
         p.fc1.in_features + p.fc2.out_features > kMostMlpChannels;
}

template <class Element>
bool is_faster_by_layers(const AttentionHalfParams<Element>& p) {
  const int64_t windows = p.attention.batch * product(p.attention.geometry.num_windows);
  return windows < layer_kernels<Element>().windows_per_thread * p.threads || p.channels > kMostHalfChannels;
}

template <class Element>
void mlp_forward(const MlpParams<Element>& p, ParallelFor parallel_for) {
  if (p.by_layers) return mlp_by_layers(p, parallel_for);
  run_tasks(layer_kernels<Element>().mlp, p, parallel_for);
}

template <class Element>
void attention_half_forward(const AttentionHalfParams<Element>& p, ParallelFor parallel_for) {
  if (p.by_layers) return attention_half_by_layers(p, parallel_for);
  run_tasks(layer_kernels<Element>().attention_half, p, parallel_for);
}

template bool is_faster_by_layers(const MlpParams<float>&);
template bool is_faster_by_layers(const MlpParams<uint16_t>&);
template bool is_faster_by_layers(const AttentionHalfParams<float>&);
template bool is_faster_by_layers(const AttentionHalfParams<uint16_t>&);
template void linear_forward(const LinearParams<float>&, ParallelFor);
template void linear_forward(const LinearParams<uint16_t>&, ParallelFor);
template void mlp_forward(const MlpParams<float>&, ParallelFor);
template void mlp_forward(const MlpParams<uint16_t>&, ParallelFor);
template void attention_half_forward(const AttentionHalfParams<float>&, ParallelFor);
template void attention_half_forward(const AttentionHalfParams<uint16_t>&, ParallelFor);

}  // namespace swinkernels::cpu
