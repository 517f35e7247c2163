// The attention half of a block, in float32, for one instruction set; see simd.inl for how this is compiled.
//
// Maths     out = x + norm(proj(attention(qkv(x)))) (v2) or x + proj(attention(qkv(norm(x)))) (v1)
// Layout    A task is a group of windows, whose rows are packed into one panel (see panels.inl): a token is a column. The
//           products q, k and v of a head are panels, too. q is what the scores need as it is, k and v are read by
//           single elements, and the output of attention is the panel that proj reads. Nothing is transposed but x and
//           the result. Windows follow one another without gaps, so in the products with weights only the last vector
//           of a group has lanes without a row.
// Tiling    A group has so few windows that its rows of x and of the output stay in L2. Its heads follow one another, so
//           that the weights of one head are read once per group.
// Work      As in linear.inl and window_attention.inl, but the maps of the norm, of q, k and v and of the output of
//           attention are never written.
#pragma once
#include "linear.inl"
#include "window_attention.inl"

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

// A group has at most about this many rows, and this many floats of all its panels.
constexpr int64_t kGroupRows = 200;
constexpr int64_t kGroupFloats = 192 << 10;

// The division of the windows into groups. The windows of a group begin N columns apart in its panels.
struct Groups {
  int64_t windows, size, count;
  int64_t stride;  // of a panel's channels

  Groups(const AttentionHalfParams& p, const Sizes& sizes) {
    const int64_t tokens = sizes.tokens, floats = tokens * (2 * larger_width(p) + 3 * sizes.dim);
    windows = p.attention.batch * product(p.attention.geometry.num_windows);
    size = smaller(smaller(kGroupRows / tokens, kGroupFloats / floats), windows / (2 * p.threads));
    size = size < 1 ? 1 : size;
    count = (windows + size - 1) / size;
    // The last vector of a window's queries may extend beyond the group. With an odd number of cache lines between
    // channels, consecutive channels of a column fall into different sets of the cache.
    stride = round_up((size - 1) * tokens + round_up(tokens, kLanes), kLine);
    stride += stride / kLine % 2 == 0 ? kLine : 0;
  }
  static int64_t larger_width(const AttentionHalfParams& p) {
    const int64_t width = int64_t{1} * p.attention.num_heads * p.attention.head_dim;
    return p.channels < width ? width : p.channels;
  }
};

struct AttentionHalf {
  Sizes sizes;
  Window window;
  Bias bias;
  Groups groups;
  int64_t *x_offsets, *out_offsets;  // of each row of the group
  int32_t* regions;                  // of each row of the group
  int64_t* bias_types;               // of each window of the group
  bool* masked;                      // of each window of the group
  float* zeros;                      // a pad token's row of x
  float* x;                          // (channels, stride): x, then the result
  float* attended;                   // (num_heads * head_dim, stride)
  float* qkv;                        // (3, head_dim, stride)
  float* scores;                     // (N, block)
  float *lse, *reciprocal;           // (block)

  AttentionHalf(const AttentionHalfParams& p, Arena& arena)
      : sizes(p.attention), window(p.attention, arena), bias(p.attention, sizes, arena), groups(p, sizes) {
    const int64_t rows = groups.size * sizes.tokens, width = int64_t{1} * p.attention.num_heads * sizes.dim;
    x_offsets = arena.take<int64_t>(rows);
    out_offsets = arena.take<int64_t>(rows);
    regions = arena.take<int32_t>(rows);
    bias_types = arena.take<int64_t>(groups.size);
    masked = arena.take<bool>(groups.size);
    zeros = arena.take<float>(p.channels);
    x = arena.take<float>(round_up(p.channels, kLanes) * groups.stride);
    attended = arena.take<float>(width * groups.stride);
    qkv = arena.take<float>(3 * sizes.dim * groups.stride);
    scores = arena.take<float>(sizes.scores());
    lse = arena.take<float>(sizes.block);
    reciprocal = arena.take<float>(sizes.block);
  }
};

// Finds the rows, the regions and the bias types of windows [first, first + count).
void find_group(const AttentionHalfParams& p, AttentionHalf& s, int64_t first, int64_t count) {
  for (int64_t w = 0; w < count; ++w) {
    const int64_t at = w * s.sizes.tokens;
    s.window.region = s.regions + at;
    s.window.move_to(first + w);
    s.window.offsets(p.x, s.x_offsets + at);
    s.window.offsets(p.out, s.out_offsets + at);
    s.masked[w] = s.window.masked;
    s.bias_types[w] = s.window.bias_type;
  }
}

// Divides the columns of a panel (count, stride) by their norms, as normalise_rows does, and multiplies them by `factor`.
void normalise_columns(int64_t count, float factor, int64_t width, int64_t stride, float* panel) {
  for (int64_t v = 0; v < width; v += kLanes) {
    Vec sum = {};
    for (int64_t c = 0; c < count; ++c) sum += load(panel + c * stride + v) * load(panel + c * stride + v);
    const Vec inverse = 1.0f / sqrt(sum);
    const Vec scale = (inverse > kMaxInverseNorm ? splat(kMaxInverseNorm) : inverse) * factor;  // NaN stays NaN
    for (int64_t c = 0; c < count; ++c) store(panel + c * stride + v, load(panel + c * stride + v) * scale);
  }
}

// panel (count, stride) = (panel + the layer's biases from `first` on) * factor.
void add_bias(const LinearLayer& layer, int64_t first, int64_t count, float factor, int64_t width, int64_t stride,
              float* panel) {
  for (int64_t c = 0; c < count; ++c) {
    const Vec bias = bias_of(layer, first + c);
    for (int64_t v = 0; v < width; v += kLanes) {
      float* at = panel + c * stride + v;
      store(at, (load(at) + bias) * factor);
    }
  }
}

// Computes q, k and v of a head for `width` columns of the group; q is multiplied by the factor of the scores.
void project_head(const AttentionHalfParams& p, AttentionHalf& s, int64_t head, int64_t width) {
  const int64_t dim = s.sizes.dim, stride = s.groups.stride;
  const bool cosine = p.attention.logit_scale != nullptr;
  for (int64_t part = 0; part < 3; ++part) {
    float* panel = s.qkv + part * dim * stride;
    const float factor = part == 0 ? score_factor(p.attention, head) : 1.0f;
    multiply_columns(p.qkv[part], head * dim, dim, s.x, panel, width, stride);
    if (cosine && part < 2) {
      add_bias(p.qkv[part], head * dim, dim, 1.0f, width, stride, panel);
      normalise_columns(dim, factor, width, stride, panel);
    } else {
      add_bias(p.qkv[part], head * dim, dim, factor, width, stride, panel);
    }
  }
}

// Computes the output of attention for one window of the group and one head.
void attend(const AttentionHalfParams& p, AttentionHalf& s, int64_t w, int64_t head) {
  const Sizes& sizes = s.sizes;
  const int64_t dim = sizes.dim, stride = s.groups.stride, at = w * sizes.tokens;
  const float *q = s.qkv + at, *k = q + dim * stride, *v = k + dim * stride;
  for (int64_t b = 0; b < sizes.blocks; ++b) {
    const int64_t first = b * sizes.block, queries = sizes.queries(b), width = round_up(queries, kLanes);
    matmul<true>(sizes.keys, width, dim, k, stride, q + first, stride, s.bias.block(s.bias_types[w], head, b), s.scores,
                 sizes.block);
    add_mask(p.attention, sizes, s.masked[w], s.regions + at, b, s.scores);
    softmax(sizes, queries, s.scores, s.lse, s.reciprocal);
    // The last vector may extend beyond the window; the next window overwrites these columns.
    float* out = s.attended + head * dim * stride + at + first;
    matmul<false>(dim, width, sizes.keys, v, stride, s.scores, sizes.block, nullptr, out, stride);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec reciprocal = load(s.reciprocal + i);
      for (int64_t c = 0; c < dim; ++c) store(out + c * stride + i, load(out + c * stride + i) * reciprocal);
    }
  }
}

int64_t attention_half_tasks(const AttentionHalfParams& p) { return Groups(p, Sizes(p.attention)).count; }

int64_t attention_half_scratch_bytes(const AttentionHalfParams& p) {
  Arena arena(nullptr);
  AttentionHalf(p, arena);
  return arena.bytes();
}

void attention_half(const AttentionHalfParams& p, int64_t* next, void* memory) {
  Arena arena(memory);
  AttentionHalf s(p, arena);
  const int64_t stride = s.groups.stride, tokens = s.sizes.tokens;
  const auto* x = static_cast<const float*>(p.x.data);
  auto* out = static_cast<float*>(p.out.data);
  clear(s.zeros, p.channels);
  clear(s.qkv, 3 * s.sizes.dim * stride);  // the scores of a last vector read columns that no product writes
  for (;;) {
    const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (task >= s.groups.count) return;
    const int64_t first = task * s.groups.size, count = smaller(s.groups.size, s.groups.windows - first);
    const int64_t rows = count * tokens, width = round_up(rows, kLanes);
    find_group(p, s, first, count);
    pack([&](int64_t r) { return s.x_offsets[r] == kPad ? s.zeros : x + s.x_offsets[r]; }, rows, p.channels, s.x,
         stride);
    if (p.norm.given) {
      normalise(p.norm, p.channels, width, s.x, stride);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; s.x_offsets[r] == kPad && c < p.channels; ++c) s.x[c * stride + r] = 0.0f;
      }
    }
    for (int64_t head = 0; head < p.attention.num_heads; ++head) {
      project_head(p, s, head, width);
      for (int64_t w = 0; w < count; ++w) attend(p, s, w, head);
    }
    LinearLayer proj = p.proj;
    multiply_columns(proj, 0, p.channels, s.attended, s.x, width, stride);
    if (p.post_norm.given) {
      add_bias(proj, 0, p.channels, 1.0f, width, stride, s.x);
      normalise(p.post_norm, p.channels, width, s.x, stride);
      proj.bias = nullptr;
    }
    unpack<Activation::kNone>(proj, 0, p.channels, s.x, stride, rows, [&](int64_t r) {
      if (s.out_offsets[r] == kPad) return Place{nullptr, nullptr};
      return Place{out + s.out_offsets[r], p.residual ? x + s.x_offsets[r] : nullptr};
    });
  }
}

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
