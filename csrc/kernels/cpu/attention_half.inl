// The attention half of a block, for one instruction set and format; see simd.inl and panels.inl for how this is compiled.
//
// Maths     out = x + norm(proj(attention(qkv(x)))) (v2) or x + proj(attention(qkv(norm(x)))) (v1)
// Layout    A task is a group of windows, whose rows are packed into one panel (see panels.inl): a token is a column. The
//           products q, k and v of a head are panels, too. q is what the scores need as it is, k and v are read by
//           single units, and the output of attention is the panel that proj reads. Nothing is transposed but x and the
//           result. In bfloat16, a unit of v and of the probabilities consists of two keys, so v is repacked for each
//           window. Tiles read k row by row, so it is transposed, too; where there is room, units of 0 fill up the
//           tiles of a window. Windows follow one another without gaps, so in the products with weights only the last
//           vector of a group has lanes without a row.
// Tiling    A group has so few windows that its rows of x and of the output stay in L2. Its heads follow one another, so
//           that the weights of one head are read once per group.
// Work      As in linear.inl and window_attention.inl, but the maps of the norm, of q, k and v and of the output of
//           attention are never written.
#pragma once
#include "linear.inl"
#include "position_bias.inl"
#include "window_attention.inl"

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

// A group has at most about this many rows, and this many floats of all its panels.
constexpr int64_t kGroupRows = kNumbers == 1 ? 200 : 256;
constexpr int64_t kGroupFloats = 192 << 10;
// A thread has at least this many groups, if there are enough windows. Each group reads all weights, and in tiles that
// takes longer than the products.
constexpr int64_t kGroupsPerThread = kHasTiles ? 1 : 2;

// The division of the windows into groups. The windows of a group begin N columns apart in its panels.
struct Groups {
  int64_t windows, size, count;
  int64_t stride;  // of a panel's channels

  Groups(const AttentionHalfParams<Element>& p, const Sizes& sizes) {
    const int64_t tokens = sizes.tokens, width = larger_width(p);
    const int64_t floats = tokens * (width + width / kNumbers + 3 * sizes.dim);
    windows = p.attention.batch * product(p.attention.geometry.num_windows);
    size = smaller(smaller(kGroupRows / tokens, kGroupFloats / floats), windows / (kGroupsPerThread * p.threads));
    size = size < 1 ? 1 : size;
    count = (windows + size - 1) / size;
    // The last vector of a window's queries may extend beyond the group. With an odd number of cache lines between
    // channels, consecutive channels of a column fall into different sets of the cache.
    stride = round_up((size - 1) * tokens + round_up(tokens, kLanes), kLine);
    stride += stride / kLine % 2 == 0 ? kLine : 0;
  }
  static int64_t larger_width(const AttentionHalfParams<Element>& p) {
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
  Element* zeros;                    // a pad token's row of x
  float* x;                          // (channels, stride): units of x, then channels of the result
  float* attended;                   // (num_heads * head_dim, stride), as units
  float* qkv;                        // (3, head_dim, stride); q and k become units
  float* scores;                     // (N, block)
  Units::Element* keys;              // (rows, keys_stride): k of one head, if there are tiles
  int64_t keys_stride;               // head_dim rounded up to whole vectors of units
  Units::Element* values;            // (value_rows, values_stride): v of one window and head
  int64_t value_rows;                // head_dim, rounded up to whole tiles if there are tiles
  int64_t values_stride;             // N rounded up to whole vectors of units
  int64_t score_units, value_units;  // that a product of q and k, or of v, multiplies
  float* output;                     // (value_rows, block): of attention, for one window and head
  float *lse, *reciprocal;           // (block)
  float* slice;                      // of a weight

  AttentionHalf(const AttentionHalfParams<Element>& p, Arena& arena)
      : sizes(p.attention), window(p.attention, arena), bias(p.attention, sizes, arena), groups(p, sizes) {
    const int64_t rows = groups.size * sizes.tokens, width = int64_t{1} * p.attention.num_heads * sizes.dim;
    x_offsets = arena.take<int64_t>(rows);
    out_offsets = arena.take<int64_t>(rows);
    regions = arena.take<int32_t>(rows);
    bias_types = arena.take<int64_t>(groups.size);
    masked = arena.take<bool>(groups.size);
    zeros = arena.take<Element>(p.channels);
    x = arena.take<float>(round_up(p.channels, kLanes) * groups.stride);
    attended = arena.take<float>(width / kNumbers * groups.stride);
    qkv = arena.take<float>(3 * sizes.dim * groups.stride);
    scores = arena.take<float>(sizes.scores());
    keys_stride = round_up(sizes.dim, kLanes * kNumbers);
    keys = arena.take<Units::Element>(kHasTiles ? groups.stride * keys_stride : 0);
    value_rows = kHasTiles ? round_up(sizes.dim, kLanes) : sizes.dim;
    values_stride = round_up(sizes.keys, kLanes * kNumbers);
    values = arena.take<Units::Element>(kNumbers > 1 ? value_rows * values_stride : 0);
    score_units = units_of(sizes.dim / kNumbers, sizes.dim);
    value_units = units_of((sizes.keys + kNumbers - 1) / kNumbers, sizes.keys);
    output = arena.take<float>(value_rows * sizes.block);
    lse = arena.take<float>(sizes.block);
    reciprocal = arena.take<float>(sizes.block);
    slice = arena.take<float>(kSliceFloats);
  }
  // Returns the number of units that a product multiplies in place of `units`: whole tiles if the panel, which has room for
  // `room` units, can be filled up with zeros.
  static int64_t units_of(int64_t units, int64_t room) {
    const int64_t tiled = round_up(units, kLanes);
    return kHasTiles && tiled <= room ? tiled : units;
  }
};

// Sets units [first, end) of a panel to 0.
void clear_units(int64_t first, int64_t end, int64_t width, float* panel, int64_t stride) {
  for (int64_t u = first; u < end; ++u) clear(panel + u * stride, width);
}

// Finds the rows, the regions and the bias types of windows [first, first + count).
void find_group(const AttentionHalfParams<Element>& p, AttentionHalf& s, int64_t first, int64_t count) {
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

// panel (count, stride) = (panel + the layer's biases from `first` on) * factor, as PanelUnits: the units of two channels
// take the place of channels that have been read before.
template <class PanelUnits>
void add_bias(const Layer& layer, int64_t first, int64_t count, float factor, int64_t width, int64_t stride,
              float* panel) {
  constexpr int kOfUnit = PanelUnits::kNumbers;
  for (int64_t c = 0; c < count; c += kOfUnit) {
    Vec bias[kOfUnit];
    for (int n = 0; n < kOfUnit; ++n) bias[n] = bias_of(layer, first + c + n);
    for (int64_t v = 0; v < width; v += kLanes) {
      Vec x[kOfUnit];
      for (int n = 0; n < kOfUnit; ++n) x[n] = (load(panel + (c + n) * stride + v) + bias[n]) * factor;
      store(panel + c / kOfUnit * stride + v, PanelUnits::join(x));
    }
  }
}

// Returns the sum of the squares of a column's channels, for a vector of columns. The order of the additions is that of
// row_products.
Vec column_squares(int64_t count, const float* panel, int64_t stride) {
  Vec sums[kLanes] = {};
  const auto add = [&](int64_t c, int i) __attribute__((always_inline)) {
    const Vec x = load(panel + (c + i) * stride);
    sums[i] += x * x;
  };
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) add(c, i);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (c + i < count) add(c, i);
  }
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; i += 2 * step) sums[i] += sums[i + step];
  }
  return sums[0];
}

// Divides the columns of a panel (count, stride) by their norms, as normalise_rows does, and multiplies them by `factor`.
// The result consists of units, as in add_bias.
void normalise_columns(int64_t count, float factor, int64_t width, int64_t stride, float* panel) {
  for (int64_t v = 0; v < width; v += kLanes) {
    const Vec inverse = 1.0f / sqrt(column_squares(count, panel + v, stride));
    const Vec scale = inverse > kMaxInverseNorm ? splat(kMaxInverseNorm) : inverse;  // NaN stays NaN
    for (int64_t c = 0; c < count; c += kNumbers) {
      Vec x[kNumbers];
      for (int n = 0; n < kNumbers; ++n) x[n] = load(panel + (c + n) * stride + v) * scale * factor;
      store(panel + c / kNumbers * stride + v, Stored::join(x));
    }
  }
}

// Sets s.keys to the columns of k, a panel of units, as rows. Units beyond head_dim are 0.
void unpack_keys(const float* k, int64_t width, AttentionHalf& s) {
  const int64_t units = s.sizes.dim / kNumbers;
  for (int64_t u = 0; u < units; u += kLanes) {
    for (int64_t v = 0; v < width; v += kLanes) {
      Vec block[kLanes] = {};
      for (int64_t i = 0; i < smaller(kLanes, units - u); ++i) block[i] = load(k + (u + i) * s.groups.stride + v);
      exchange_rows<1>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_memcpy(s.keys + (v + i) * s.keys_stride + u * kNumbers, &block[i], sizeof(block[i]));
      }
    }
  }
}

// Computes q, k and v of a head for `width` columns of the group; q is multiplied by the factor of the scores.
void project_head(const AttentionHalfParams<Element>& p, AttentionHalf& s, int64_t head, int64_t width) {
  const int64_t dim = s.sizes.dim, stride = s.groups.stride;
  const bool cosine = p.attention.logit_scale != nullptr;
  for (int64_t part = 0; part < 3; ++part) {
    float* panel = s.qkv + part * dim * stride;
    const float factor = part == 0 ? score_factor(p.attention, head) : 1.0f;
    multiply_columns(p.qkv[part], head * dim, dim, s.x, panel, width, stride, s.slice);
    if (part == 2) {  // with units of two numbers, pack_values adds the bias
      if constexpr (kNumbers == 1) add_bias<Stored>(p.qkv[part], head * dim, dim, 1.0f, width, stride, panel);
    } else if (cosine) {
      add_bias<Float32Units>(p.qkv[part], head * dim, dim, 1.0f, width, stride, panel);
      normalise_columns(dim, factor, width, stride, panel);
    } else {
      add_bias<Stored>(p.qkv[part], head * dim, dim, factor, width, stride, panel);
    }
    if (part == 0) clear_units(dim / kNumbers, s.score_units, width, panel, stride);
    if (kHasTiles && part == 1) unpack_keys(panel, width, s);
  }
}

// Sets s.values to v + bias of one window and head: a unit consists of two keys, and missing keys are 0.
[[maybe_unused]] void pack_values(const Layer& layer, int64_t head, const float* v, AttentionHalf& s) {
  const int64_t dim = s.sizes.dim, keys = s.sizes.keys;
  for (int64_t d = 0; d < dim; ++d) {
    const Vec bias = bias_of(layer, head * dim + d);
    Units::Element* row = s.values + d * s.values_stride;
    for (int64_t i = 0; i < keys; i += kLanes) {
      *reinterpret_cast<Units::Format::Memory*>(row + i) =
          Units::Format::narrow(load(v + d * s.groups.stride + i) + bias);
    }
    for (int64_t i = keys; i < (kHasTiles ? s.values_stride : round_up(keys, kNumbers)); ++i) row[i] = 0;
  }
}

// Computes the output of attention for one window of the group and one head.
void attend(const AttentionHalfParams<Element>& p, AttentionHalf& s, int64_t w, int64_t head) {
  const Sizes& sizes = s.sizes;
  const int64_t dim = sizes.dim, stride = s.groups.stride, at = w * sizes.tokens;
  const float *q = s.qkv + at, *k = q + dim * stride, *v = k + dim * stride;
  if constexpr (kNumbers > 1) pack_values(p.qkv[2], head, v, s);
  for (int64_t b = 0; b < sizes.blocks; ++b) {
    const int64_t first = b * sizes.block, queries = sizes.queries(b), width = round_up(queries, kLanes);
    const float* bias = s.bias.block(s.bias_types[w], head, b);
    if constexpr (kHasTiles) {
      matmul_fetching<Units>(sizes.keys, width, s.score_units, s.keys + at * s.keys_stride, s.keys_stride, q + first,
                             stride, bias, s.scores, sizes.block);
    } else {
      matmul<true, Units>(sizes.keys, width, s.score_units, reinterpret_cast<const Units::Element*>(k),
                          stride * kNumbers, q + first, stride, bias, s.scores, sizes.block);
    }
    add_mask(p.attention, sizes, s.masked[w], s.regions + at, b, s.scores);
    softmax<Stored>(sizes, queries, s.scores, s.lse, s.reciprocal);
    if constexpr (kNumbers > 1) {
      clear_units((sizes.keys + kNumbers - 1) / kNumbers, s.value_units, width, s.scores, sizes.block);
      matmul_fetching<Units>(s.value_rows, width, s.value_units, s.values, s.values_stride, s.scores, sizes.block,
                             nullptr, s.output, sizes.block);
    } else {
      matmul<false>(dim, width, sizes.keys, v, stride, s.scores, sizes.block, nullptr, s.output, sizes.block);
    }
    // The last vector may extend beyond the window; the next window overwrites these columns.
    float* out = s.attended + head * dim / kNumbers * stride + at + first;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec reciprocal = load(s.reciprocal + i);
      for (int64_t c = 0; c < dim; c += kNumbers) {
        Vec x[kNumbers];
        for (int n = 0; n < kNumbers; ++n) x[n] = load(s.output + (c + n) * sizes.block + i) * reciprocal;
        store(out + c / kNumbers * stride + i, Stored::join(x));
      }
    }
  }
}

int64_t attention_half_tasks(const AttentionHalfParams<Element>& p) { return Groups(p, Sizes(p.attention)).count; }

int64_t attention_half_scratch_bytes(const AttentionHalfParams<Element>& p) {
  Arena arena(nullptr);
  AttentionHalf(p, arena);
  return arena.bytes();
}

void attention_half(const AttentionHalfParams<Element>& p, int64_t* next, void* memory) {
  [[maybe_unused]] const TileRegisters tiles;
  Arena arena(memory);
  AttentionHalf s(p, arena);
  const int64_t stride = s.groups.stride, tokens = s.sizes.tokens;
  const int64_t units = p.channels / kNumbers;
  const auto* x = static_cast<const Element*>(p.x.data);
  auto* out = static_cast<Element*>(p.out.data);
  for (int64_t c = 0; c < p.channels; ++c) s.zeros[c] = 0;
  clear(s.qkv, 3 * s.sizes.dim * stride);  // the scores of a last vector read columns that no product writes
  if (kHasTiles) {
    for (int64_t i = 0; i < s.value_rows * s.values_stride; ++i) s.values[i] = 0;
  }
  for (;;) {
    const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (task >= s.groups.count) return;
    const int64_t first = task * s.groups.size, count = smaller(s.groups.size, s.groups.windows - first);
    const int64_t rows = count * tokens, width = round_up(rows, kLanes);
    find_group(p, s, first, count);
    pack([&](int64_t r) { return s.x_offsets[r] == kPad ? s.zeros : x + s.x_offsets[r]; }, rows, units, s.x, stride);
    if (p.norm.given) {
      normalise<Stored>(p.norm, p.channels, width, s.x, stride);
      for (int64_t r = 0; r < rows; ++r) {
        if (s.x_offsets[r] != kPad) continue;
        for (int64_t u = 0; u < units; ++u) s.x[u * stride + r] = 0.0f;
      }
    }
    for (int64_t head = 0; head < p.attention.num_heads; ++head) {
      project_head(p, s, head, width);
      for (int64_t w = 0; w < count; ++w) attend(p, s, w, head);
    }
    Layer proj = p.proj;
    multiply_columns(proj, 0, p.channels, s.attended, s.x, width, stride, s.slice);
    if (p.post_norm.given) {
      add_bias<Float32Units>(proj, 0, p.channels, 1.0f, width, stride, s.x);
      normalise<Float32Units>(p.post_norm, p.channels, width, s.x, stride);
      proj.bias = nullptr;
    }
    unpack<Activation::kNone>(proj, 0, p.channels, s.x, stride, rows, [&](int64_t r) {
      if (s.out_offsets[r] == kPad) return Place{nullptr, nullptr};
      return Place{out + s.out_offsets[r], p.residual ? x + s.x_offsets[r] : nullptr};
    });
  }
}

constexpr LayerKernels<Element> kLayerKernels = {{linear_tasks, linear_scratch_bytes, linear},
                                                 {mlp_tasks, mlp_scratch_bytes, mlp},
                                                 {norm_tasks, norm_scratch_bytes, norm},
                                                 {attention_half_tasks, attention_half_scratch_bytes, attention_half},
                                                 {position_bias_tasks, position_bias_scratch_bytes, position_bias},
                                                 kHasTiles ? 64 : 256,
                                                 2 * kGroupsPerThread};

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
