// Window attention, forward and backward, for one instruction set; see simd.inl for how this is compiled.
//
// Maths     forward   S = factor q k^T + bias + mask, P = softmax(S), out = P v, lse = log sum exp S
//           backward  P = exp(S - lse), dP = dout v^T, delta = rowsum(P dP), dS = P (dP - delta),
//                     dv = P^T dout, dq = factor dS k, dk = factor dS^T q, dbias = dS
//           v2        q and k are rows of unit length u = x / max(norm, 1e-12), factor = exp(min(logit_scale, ln 100));
//                     dx = (du - u (u . du)) / norm, and dlogit_scale = factor sum (u . dS k) over the rows u of q
// Layout    Scores are stored transposed, (keys, queries). Softmax and delta are reductions along the columns, for a
//           vector of queries at a time, so nothing is summed across a vector. The products with v and k read the
//           scores by column. Only q (and dout) have to be transposed.
// Tiling    One window and head at a time. Its k and v rows are converted to float32 in scratch memory, and its queries
//           are processed in blocks of at most kMaxQueryBlock. For window 7 and head_dim 32 all data stays in L1, and
//           for 1024 tokens the scores of a block stay in L2.
// Work      4 N^2 head_dim operations forward and 10 N^2 head_dim backward for each window and head, with N rounded up
//           to whole vectors, and one exp per score in either pass. In windows of more than about 30 tokens, the
//           kernels are bound by arithmetic, not by memory. v2 adds work per row, not per score: about 7 % at window 8
//           and head_dim 32.
#pragma once
#include "arena.inl"

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

// 4 AVX-512 vectors, the width of a tile in the matmul that computes the scores.
constexpr int64_t kMaxQueryBlock = 64;
// The maximum size of the cache that keeps the expanded bias (keys, queries) of several heads from window to window.
constexpr int64_t kMaxBiasCacheBytes = 1 << 20;
// Sums over keys are split into partial sums over this many keys, which limits the growth of rounding errors.
constexpr int64_t kSummedKeys = 16;

SWINKERNELS_INLINE int64_t product(const int32_t (&v)[3]) { return int64_t{1} * v[0] * v[1] * v[2]; }

// Sizes derived from the parameters.
struct Sizes {
  int64_t tokens;  // N
  int64_t keys;    // M; equals N without a key margin
  int64_t key_window[3];
  int64_t dim, row;    // head_dim, and head_dim rounded up to whole vectors
  int64_t block;       // queries in a block, rounded up to whole vectors
  int64_t blocks;      // blocks in a window
  bool overlap;        // windows share keys
  bool pairs = false;  // the table has rows for pairs of coordinates on some axis
  int64_t table_rows;
  int64_t rows_of_axis[3];  // table rows of each axis

  explicit Sizes(const WindowAttentionForwardParams& p) {
    const WindowGeometry& g = p.geometry;
    tokens = product(g.window);
    keys = table_rows = 1;
    overlap = false;
    for (int i = 0; i < 3; ++i) overlap = overlap || g.key_margin[i] > 0;
    for (int i = 0; i < 3; ++i) {
      key_window[i] = g.window[i] + 2 * g.key_margin[i];
      rows_of_axis[i] = g.table_pairs[i] ? g.window[i] * g.window[i]
                        : overlap        ? g.window[i] + key_window[i] - 1
                                         : 2 * g.table_window[i] - 1;
      pairs = pairs || g.table_pairs[i];
      keys *= key_window[i];
      table_rows *= rows_of_axis[i];
    }
    dim = p.head_dim;
    row = round_up(dim, kLanes);
    blocks = (tokens + kMaxQueryBlock - 1) / kMaxQueryBlock;
    block = round_up((tokens + blocks - 1) / blocks, kLanes);
    blocks = (tokens + block - 1) / block;
  }
  int64_t queries(int64_t b) const { return smaller(tokens - b * block, block); }
  int64_t scores() const { return keys * block; }  // elements of a block's scores (keys, queries)
};

template <class Action>
SWINKERNELS_INLINE void with_format(DType dtype, Action action) {
  switch (dtype) {
    case DType::kFloat32:
      return action(Float32());
    case DType::kFloat16:
      return action(Float16());
    case DType::kBFloat16:
      return action(BFloat16());
  }
}

// ---- Token positions of a window ----

constexpr int64_t kPad = -1;  // the offset of a pad token

class Window {
 public:
  int64_t batch;
  int64_t bias_type;
  int32_t* region;  // (N), valid only if masked
  bool masked;      // the tokens belong to several regions
  bool padded;      // some tokens are pad tokens

  Window(const WindowAttentionForwardParams& p, Arena& arena) : params_(p) {
    const WindowGeometry& g = p.geometry;
    region = arena.take<int32_t>(product(g.window));
    for (int i = 0; i < 3; ++i) {
      frame_[i] = arena.take<int32_t>(g.window[i]);
      source_[i] = arena.take<int32_t>(g.window[i]);
      shift_region_[i] = arena.take<int32_t>(g.window[i]);
      has_regions_ = has_regions_ || (g.shift[i] > 0 && !g.periodic[i]);
    }
    has_regions_ = has_regions_ || p.region_map != nullptr;
    for (int i = 0; i < 3; ++i) {
      key_window_[i] = g.window[i] + 2 * g.key_margin[i];
      key_source_[i] = g.key_margin[i] == 0 ? source_[i] : arena.take<int32_t>(key_window_[i]);
    }
  }

  void move_to(int64_t index) {
    const WindowGeometry& g = params_.geometry;
    const int64_t windows = product(g.num_windows);
    bias_type = index % windows / (windows / params_.bias_types);
    padded = false;
    for (int i = 2; i >= 0; --i) {
      const int32_t n = static_cast<int32_t>(index % g.num_windows[i]);
      index /= g.num_windows[i];
      for (int32_t t = 0; t < g.window[i]; ++t) {
        const int32_t frame = g.grid ? t * g.num_windows[i] + n : n * g.window[i] + t;
        int32_t y;
        if (g.roll_then_pad) {
          y = frame - g.pad_before[i];
          if (y >= 0 && y < g.size[i]) y = (y + g.shift[i]) % g.size[i];
        } else {
          y = frame + g.shift[i];
          y = (y < g.frame[i] ? y : y - g.frame[i]) - g.pad_before[i];
        }
        const bool is_pad = y < 0 || y >= g.size[i];
        padded = padded || is_pad;
        frame_[i][t] = frame;
        source_[i][t] = is_pad ? -1 : y;
        shift_region_[i][t] = g.shift[i] == 0 || g.periodic[i]
                                  ? 0
                                  : (frame >= g.frame[i] - g.window[i]) + (frame >= g.frame[i] - g.shift[i]);
      }
      for (int32_t t = 0; g.key_margin[i] > 0 && t < key_window_[i]; ++t) {
        const int32_t y = n * g.window[i] + t - g.key_margin[i] - g.pad_before[i];
        key_source_[i][t] = y < 0 || y >= g.size[i] ? -1 : y;
        padded = padded || key_source_[i][t] < 0;
      }
    }
    batch = index;
    masked = has_regions_ && find_regions();
  }

  // Writes the offsets of the window's rows for head 0, in elements from the map's data; kPad for pad tokens.
  template <class Pointer>
  void offsets(const TokenMapOf<Pointer>& map, int64_t* to) const {
    offsets_of(params_.geometry.window, source_, map, to);
  }

  // Writes the offsets of the rows of the window's keys, in the same form.
  template <class Pointer>
  void key_offsets(const TokenMapOf<Pointer>& map, int64_t* to) const {
    offsets_of(key_window_, key_source_, map, to);
  }

 private:
  template <class Pointer>
  void offsets_of(const int32_t (&w)[3], int32_t* const (&source)[3], const TokenMapOf<Pointer>& map,
                  int64_t* to) const {
    const int64_t (&stride)[3] = map.axis_stride;
    for (int32_t a = 0; a < w[0]; ++a) {
      for (int32_t b = 0; b < w[1]; ++b) {
        const bool is_pad = source[0][a] < 0 || source[1][b] < 0;
        const int64_t base = batch * map.batch_stride + source[0][a] * stride[0] + source[1][b] * stride[1];
        for (int32_t c = 0; c < w[2]; ++c) {
          *to++ = is_pad || source[2][c] < 0 ? kPad : base + source[2][c] * stride[2];
        }
      }
    }
  }

  bool find_regions() {
    const WindowGeometry& g = params_.geometry;
    bool differ = false;
    int32_t* to = region;
    for (int32_t a = 0; a < g.window[0]; ++a) {
      for (int32_t b = 0; b < g.window[1]; ++b) {
        const int64_t frame_row = (int64_t{frame_[0][a]} * g.frame[1] + frame_[1][b]) * g.frame[2];
        const int32_t region_row = (shift_region_[0][a] * 3 + shift_region_[1][b]) * 3;
        for (int32_t c = 0; c < g.window[2]; ++c) {
          *to = params_.region_map == nullptr ? region_row + shift_region_[2][c]
                                              : params_.region_map[frame_row + frame_[2][c]];
          differ = differ || *to != region[0];
          ++to;
        }
      }
    }
    return differ;
  }

  const WindowAttentionForwardParams& params_;
  bool has_regions_ = false;
  int32_t *frame_[3], *source_[3], *shift_region_[3];  // per axis and token
  int32_t key_window_[3], *key_source_[3];             // per axis and key
};

// ---- Copies between the maps and scratch memory ----

// Converts tokens [first, first + count) of one head to float32 rows. The rows of pad tokens become `pad`, or zeros if
// it is null.
void gather(DType dtype, const ConstTokenMap& map, const int64_t* offsets, int64_t first, int64_t count, int64_t head,
            const void* pad, const Sizes& sizes, float* rows) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    using Element = typename Format::Element;
    const auto* data = static_cast<const Element*>(map.data) + head * map.head_stride;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = offsets[first + i];
      const void* from = offset == kPad ? pad : data + offset;
      float* row = rows + i * sizes.row;
      if (from == nullptr) {
        for (int64_t c = 0; c < sizes.row; c += kLanes) store(row + c, Vec{});
      } else {
        load_row<Format>(from, sizes.dim, row);
      }
    }
  });
}

// Writes rows back to the map, except for pad tokens; row i is multiplied by factor(i).
template <class Factor>
SWINKERNELS_INLINE void scatter(DType dtype, const TokenMap& map, const int64_t* offsets, int64_t first, int64_t count,
                                int64_t head, const Sizes& sizes, Factor factor, const float* rows) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    using Element = typename Format::Element;
    auto* data = static_cast<Element*>(map.data) + head * map.head_stride;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = offsets[first + i];
      if (offset != kPad) store_row<Format>(rows + i * sizes.row, sizes.dim, factor(i), data + offset);
    }
  });
}

// Returns the q, k or v (part 0, 1 or 2) of a head's pad token, or null if it is zero.
SWINKERNELS_INLINE const void* pad_row(const WindowAttentionForwardParams& p, int64_t part, int64_t head) {
  if (p.pad_qkv == nullptr) return nullptr;
  const int64_t item = p.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<const char*>(p.pad_qkv) + (part * p.num_heads + head) * p.head_dim * item;
}

// to (row, block) = factor times the transpose of rows (queries, row); lanes after the last query are zero.
void transpose_rows(const Sizes& sizes, int64_t queries, float* rows, float factor, float* to) {
  const int64_t whole = round_up(queries, kLanes);
  for (int64_t i = queries * sizes.row; i < whole * sizes.row; i += kLanes) store(rows + i, Vec{});
  transpose(rows, whole, sizes.row, sizes.row, factor, to, sizes.block);
}

// ---- The bias ----

// The bias that is added to the scores, from the relative position table or a dense bias, in the layout of the scores:
// (keys, queries).
class Bias {
 public:
  Bias(const WindowAttentionForwardParams& p, const Sizes& sizes, Arena& arena)
      : sizes_(sizes), table_(p.bias_table), dense_(p.bias), num_heads_(p.num_heads), types_(p.bias_types) {
    if (table_ == nullptr && dense_ == nullptr) return;
    if (table_ != nullptr) {
      offset_ = arena.take<int64_t>(sizes.tokens);
      key_offset_ = sizes.overlap || sizes.pairs ? arena.take<int64_t>(sizes.keys) : offset_;
      run_ = arena.take<int64_t>(sizes.tokens + 1);
      column_ = arena.take<float>(sizes.table_rows + kLanes);
    }
    const int64_t bytes_of_head = sizes.blocks * sizes.scores() * static_cast<int64_t>(sizeof(float));
    cached_heads_ = smaller(num_heads_, kMaxBiasCacheBytes / bytes_of_head);
    head_stride_ = sizes.blocks * sizes.scores() + kLanes;
    written_ = arena.take<float>(cached_heads_ * head_stride_ + sizes.scores() + kLanes);
    cached_type_ = arena.take<int64_t>(num_heads_);
    if (written_ == nullptr) return;

    for (int64_t h = 0; h < num_heads_; ++h) cached_type_[h] = -1;
    if (table_ == nullptr) return;
    for (int64_t i = 0; i < kLanes; ++i) column_[sizes.table_rows + i] = 0.0f;
    const int64_t stride[3] = {sizes.rows_of_axis[1] * sizes.rows_of_axis[2], sizes.rows_of_axis[2], 1};
    int64_t of_query[3], of_key[3];  // extents that split the indices of queries and keys into coordinates
    for (int axis = 0; axis < 3; ++axis) {
      of_query[axis] = sizes.overlap ? p.geometry.window[axis] : p.geometry.table_window[axis];
      of_key[axis] = sizes.overlap ? sizes.key_window[axis] : p.geometry.table_window[axis];
      if (!p.geometry.table_pairs[axis]) centre_ += (of_key[axis] - 1) * stride[axis];
    }
    const auto coordinate = [](const int64_t (&window)[3], int64_t token, int axis) {
      for (int i = 2; i > axis; --i) token /= window[i];
      return axis == 0 ? token : token % window[axis];
    };
    for (int64_t j = 0; key_offset_ != offset_ && j < sizes.keys; ++j) {
      key_offset_[j] = 0;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t step = p.geometry.table_pairs[axis] ? -of_query[axis] : 1;
        key_offset_[j] += coordinate(of_key, j, axis) * step * stride[axis];
      }
    }
    for (int64_t i = 0; i < sizes.tokens; ++i) {
      offset_[i] = 0;
      for (int axis = 0; axis < 3; ++axis) offset_[i] += coordinate(of_query, i, axis) * stride[axis];
      if (i == 0 || offset_[i] != offset_[i - 1] + 1 || i % sizes.block == 0) run_[runs_++] = i;
    }
    run_[runs_] = sizes.tokens;
  }

  // Returns the bias (keys, queries) of query block b in a window of bias type `type`, or null without a bias.
  const float* block(int64_t type, int64_t head, int64_t b) {
    if (table_ == nullptr && dense_ == nullptr) return nullptr;
    if (head < cached_heads_) {
      float* cached = written_ + head * head_stride_;
      if (cached_type_[head] != type) {
        for (int64_t i = 0; i < sizes_.blocks; ++i) write(type, head, i, cached + i * sizes_.scores());
        cached_type_[head] = type;
      }
      return cached + b * sizes_.scores();
    }
    float* written = written_ + cached_heads_ * head_stride_;
    write(type, head, b, written);
    return written;
  }

  // Adds dscores, the gradient of the scores of block b, to dcolumn, the gradient of a head's column of the table.
  // dcolumn has table_rows + kLanes elements.
  void add_table_gradient(const float* dscores, int64_t b, float* dcolumn) const {
    for_each_run(b, [&](int64_t key, int64_t query, int64_t length) {
      const float* from = dscores + key * sizes_.block + query - b * sizes_.block;
      float* to = dcolumn + centre_ - key_offset_[key] + offset_[query];
      for (int64_t i = 0; i < length; i += kLanes) {
        const Int mask = first_lanes(length - i);
        store(to + i, load(to + i) + (Vec)((Int)load(from + i) & mask));
      }
    });
  }

  // Writes dbias (N, M), the gradient of a dense bias, from dscores, the gradients of the scores of all blocks.
  void write_dense_gradient(const float* dscores, float* dbias) const {
    for (int64_t b = 0; b < sizes_.blocks; ++b) {
      transpose_any(dscores + b * sizes_.scores(), sizes_.keys, sizes_.queries(b), sizes_.block,
                    dbias + b * sizes_.block * sizes_.keys, sizes_.keys);
    }
  }

 private:
  void write(int64_t type, int64_t head, int64_t b, float* to) {
    if (table_ == nullptr) {
      const float* from = dense_ + ((type * num_heads_ + head) * sizes_.tokens + b * sizes_.block) * sizes_.keys;
      return transpose_any(from, sizes_.queries(b), sizes_.keys, sizes_.keys, to, sizes_.block);
    }
    if (column_head_ != head || column_type_ != type) {
      for (int64_t i = 0; i < sizes_.table_rows; ++i) column_[i] = table_[(i * types_ + type) * num_heads_ + head];
      column_head_ = head;
      column_type_ = type;
    }
    for_each_run(b, [&](int64_t key, int64_t query, int64_t length) {
      const float* from = column_ + centre_ - key_offset_[key] + offset_[query];
      float* row = to + key * sizes_.block + query - b * sizes_.block;
      for (int64_t i = 0; i < length; i += kLanes) store(row + i, load(from + i));
    });
  }

  // Calls action(key, first query, length) for each key and each run of queries in block b. A run is a range of queries
  // [i, i + length) with r(i + t) = r(i) + t (see WindowGeometry), usually a row of the window: their biases for one
  // key are contiguous in the table's column. So the table is read, and its gradient summed, in vectors, without an
  // index per score. The last vector of a run may extend beyond the run; the biases written there are overwritten by
  // the next run or unused.
  template <class Action>
  SWINKERNELS_INLINE void for_each_run(int64_t b, Action action) const {
    const int64_t first = b * sizes_.block, last = first + sizes_.queries(b);
    int64_t first_run = 0;
    while (run_[first_run] < first) ++first_run;
    for (int64_t key = 0; key < sizes_.keys; ++key) {
      for (int64_t r = first_run; run_[r] < last; ++r) action(key, run_[r], run_[r + 1] - run_[r]);
    }
  }

  const Sizes& sizes_;
  const float *table_, *dense_;
  int64_t num_heads_, types_;
  // For the table: centre_ is r_max; offset_ and key_offset_ are r(token) of queries and keys; run_ has the first query
  // of each run, then N; column_ caches the column of the head column_head_ and the type column_type_.
  int64_t centre_ = 0, runs_ = 0, column_head_ = -1, column_type_ = -1;
  int64_t *offset_ = nullptr, *key_offset_ = nullptr, *run_ = nullptr;
  float* column_ = nullptr;
  // The expanded bias (keys, queries): all blocks of each cached head, for the type in cached_type_; then space for one
  // block of any other head.
  int64_t cached_heads_ = 0, head_stride_ = 0;
  float* written_ = nullptr;
  int64_t* cached_type_ = nullptr;
};

#include "axis_tables.inl"

// ---- Rows of unit length (v2) ----

constexpr float kMaxInverseNorm = 1e12f;  // norms below 1e-12 are replaced by 1e-12

// Divides the rows by their norms and writes the reciprocals of the norms to inverse_norms. `rows` and `inverse_norms`
// have space for `count` rounded up to a multiple of kLanes.
void normalise_rows(const Sizes& sizes, int64_t count, float* rows, float* inverse_norms) {
  for (int64_t first = 0; first < count; first += kLanes) {
    float* group = rows + first * sizes.row;
    const Vec inverse = 1.0f / sqrt(row_products(group, group, sizes.row));
    store(inverse_norms + first, inverse > kMaxInverseNorm ? splat(kMaxInverseNorm) : inverse);  // NaN stays NaN
    for (int64_t i = first; i < smaller(first + kLanes, count); ++i) {
      float* row = rows + i * sizes.row;
      for (int64_t c = 0; c < sizes.row; c += kLanes) store(row + c, load(row + c) * inverse_norms[i]);
    }
  }
}

// Turns the gradient of normalised rows into the gradient of the original rows. Returns partial sums of the dot
// products of each row and its gradient: lane r sums over rows r, r + kLanes, ...
Vec normalise_rows_backward(const Sizes& sizes, int64_t count, const float* rows, const float* inverse_norms,
                            float* gradients) {
  Vec sum = {};
  for (int64_t first = 0; first < count; first += kLanes) {
    const Vec products = row_products(rows + first * sizes.row, gradients + first * sizes.row, sizes.row);
    sum += (Vec)((Int)products & first_lanes(count - first));
    // The gradient of a unit row has no component along the row. A row with a norm below 1e-12 was divided by a
    // constant, so its gradient keeps that component.
    float along[kLanes];
    store(along, load(inverse_norms + first) < kMaxInverseNorm ? products : Vec{});
    for (int64_t i = first; i < smaller(first + kLanes, count); ++i) {
      const float* row = rows + i * sizes.row;
      float* gradient = gradients + i * sizes.row;
      for (int64_t c = 0; c < sizes.row; c += kLanes) {
        store(gradient + c, (load(gradient + c) - load(row + c) * along[i - first]) * inverse_norms[i]);
      }
    }
  }
  return sum;
}

// ---- Scores ----

// Transposes and scales the queries `rows` (queries, row) to q_t (row, block). Returns the initial scores of the block:
// its bias, or null without a bias. With axis_tables, the bias is written to `scores`.
SWINKERNELS_INLINE const float* start_scores(const Sizes& sizes, Bias& bias, AxisTables& axes, int64_t type,
                                             int64_t head, int64_t b, float factor, float* rows, float* q_t,
                                             float* scores) {
  const int64_t queries = sizes.queries(b);
  if (!axes.given()) {
    transpose_rows(sizes, queries, rows, factor, q_t);
    return bias.block(type, head, b);
  }
  transpose_rows(sizes, queries, rows, 1.0f, q_t);
  axes.write_bias(b, q_t, scores);
  for (int64_t i = 0; i < sizes.row * sizes.block; i += kLanes) store(q_t + i, load(q_t + i) * factor);
  return scores;
}

// Adds the mask to the scores (keys, queries) of block b.
void add_mask(const WindowAttentionForwardParams& p, const Sizes& sizes, bool masked, const int32_t* region, int64_t b,
              float* scores) {
  if (!masked) return;
  const int64_t queries = sizes.queries(b);
  const Int mask_value = (Int)splat(p.mask_value);
  for (int64_t i = 0; i < queries; i += kLanes) {
    const int64_t left = queries - i;
    Int query_region;
    if (left >= kLanes) {
      query_region = load(region + b * sizes.block + i);
    } else {
      int32_t tail[kLanes] = {};
      for (int64_t lane = 0; lane < left; ++lane) tail[lane] = region[b * sizes.block + i + lane];
      query_region = load(tail);
    }
    for (int64_t key = 0; key < sizes.keys; ++key) {
      float* at = scores + key * sizes.block + i;
      store(at, load(at) + (Vec)((query_region != splat(region[key])) & mask_value));
    }
  }
}

// Computes the scores (keys, queries) of a block: k (M, row) times the scaled queries q_t (row, block), plus bias and
// mask.
void compute_scores(const WindowAttentionForwardParams& p, const Sizes& sizes, const Window& window, const float* k,
                    const float* q_t, const float* bias, int64_t b, float* scores) {
  const int64_t queries = sizes.queries(b);
  matmul<false>(sizes.keys, round_up(queries, kLanes), sizes.dim, k, sizes.row, q_t, sizes.block, bias, scores,
                sizes.block);
  add_mask(p, sizes, window.masked, window.region, b, scores);
}

// ---- Forward ----

struct Forward {
  Sizes sizes;
  Window window;
  Bias bias;
  AxisTables axes;
  int64_t *q_offsets, *k_offsets, *v_offsets, *out_offsets;
  float *k, *v;             // (M, row)
  float* rows;              // (block, row): q, then out
  float* q_t;               // (row, block)
  float* scores;            // (M, block)
  float *lse, *reciprocal;  // (block)
  float* inverse_norms;     // (M)

  Forward(const WindowAttentionForwardParams& p, Arena& arena)
      : sizes(p), window(p, arena), bias(p, sizes, arena), axes(p, sizes, arena) {
    int64_t** const offsets[] = {&q_offsets, &k_offsets, &v_offsets, &out_offsets};
    for (int64_t** map : offsets) *map = arena.take<int64_t>(sizes.keys);
    k = arena.take<float>(round_up(sizes.keys, kLanes) * sizes.row);
    v = arena.take<float>(sizes.keys * sizes.row);
    rows = arena.take<float>(sizes.block * sizes.row);
    q_t = arena.take<float>(sizes.row * sizes.block);
    scores = arena.take<float>(sizes.scores());
    lse = arena.take<float>(sizes.block);
    reciprocal = arena.take<float>(sizes.block);
    inverse_norms = arena.take<float>(round_up(sizes.keys, kLanes));
  }
};

// Turns a block's scores into units of exp(score - max), along the keys, and writes lse and the reciprocal of the sum. The
// units of two keys take the place of keys that have been read before; a missing last key counts as 0.
template <class Units>
void softmax(const Sizes& sizes, int64_t queries, float* scores, float* lse, float* reciprocal) {
  constexpr int kOfUnit = Units::kNumbers;
  for (int64_t i = 0; i < queries; i += kLanes) {
    Vec max = load(scores + i);
    for (int64_t key = 1; key < sizes.keys; ++key) max = larger(load(scores + key * sizes.block + i), max);
    Vec sum = {};
    for (int64_t first = 0; first < sizes.keys; first += kSummedKeys) {
      Vec part = {};
      const int64_t end = smaller(first + kSummedKeys, sizes.keys);
      const auto add = [&](int64_t key, auto count) __attribute__((always_inline)) {
        Vec x[kOfUnit] = {};
        for (int n = 0; n < decltype(count)::kValue; ++n) {
          x[n] = Units::exp(load(scores + (key + n) * sizes.block + i) - max);
          part += x[n];
        }
        store(scores + key / kOfUnit * sizes.block + i, Units::join(x));
      };
      for (int64_t key = first; key + kOfUnit <= end; key += kOfUnit) add(key, Constant<kOfUnit>());
      if ((end - first) % kOfUnit != 0) add(end - 1, Constant<1>());
      sum += part;
    }
    store(lse + i, max + log(sum));
    store(reciprocal + i, 1.0f / sum);
  }
}

void forward(const WindowAttentionForwardParams& p, int64_t begin, int64_t end, void* scratch) {
  Arena arena(scratch);
  Forward s(p, arena);
  const Sizes& sizes = s.sizes;
  int64_t at_window = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t index = task / p.num_heads, head = task % p.num_heads;
    if (index != at_window) {
      at_window = index;
      s.window.move_to(index);
      s.window.offsets(p.q, s.q_offsets);
      s.window.key_offsets(p.k, s.k_offsets);
      s.window.key_offsets(p.v, s.v_offsets);
      s.window.offsets(p.out, s.out_offsets);
    }
    gather(p.dtype, p.k, s.k_offsets, 0, sizes.keys, head, pad_row(p, 1, head), sizes, s.k);
    gather(p.dtype, p.v, s.v_offsets, 0, sizes.keys, head, pad_row(p, 2, head), sizes, s.v);
    if (p.logit_scale != nullptr) normalise_rows(sizes, sizes.keys, s.k, s.inverse_norms);
    const float factor = score_factor(p, head);
    for (int64_t b = 0; b < sizes.blocks; ++b) {
      const int64_t first = b * sizes.block, queries = sizes.queries(b);
      gather(p.dtype, p.q, s.q_offsets, first, queries, head, pad_row(p, 0, head), sizes, s.rows);
      if (p.logit_scale != nullptr) normalise_rows(sizes, queries, s.rows, s.inverse_norms);
      const float* start =
          start_scores(sizes, s.bias, s.axes, s.window.bias_type, head, b, factor, s.rows, s.q_t, s.scores);
      compute_scores(p, sizes, s.window, s.k, s.q_t, start, b, s.scores);
      softmax<Float32Units>(sizes, queries, s.scores, s.lse, s.reciprocal);
      matmul<true>(queries, sizes.row, sizes.keys, s.scores, sizes.block, s.v, sizes.row, nullptr, s.rows, sizes.row);
      scatter(
          p.dtype, p.out, s.out_offsets, first, queries, head, sizes, [&](int64_t i) { return s.reciprocal[i]; },
          s.rows);
      if (p.lse != nullptr) {
        float* lse = p.lse + task * sizes.tokens + first;
        for (int64_t i = 0; i < queries; ++i) lse[i] = s.lse[i];
      }
    }
  }
}

// ---- Backward ----

struct Backward {
  Sizes sizes;
  Window window;
  Bias bias;
  AxisTables axes;
  int64_t *q_offsets, *k_offsets, *v_offsets, *dout_offsets, *dq_offsets, *dk_offsets, *dv_offsets;
  float *k, *v, *dk, *dv;                    // (M, row)
  float *q, *dout, *dq;                      // (block, row)
  float *q_t, *dout_t;                       // (row, block)
  float *scores, *dscores;                   // (M, block); scores become probabilities
  float* lse;                                // (block)
  float *inverse_q_norms, *inverse_k_norms;  // (block), (M)
  // Sums over a chunk's windows:
  float* dbias = nullptr;  // (blocks, M, block), the sum of dscores; used for a table only if there is one block
  float* dcolumn;          // (table_rows)
  float* daxis_tables;     // (rows of all axes, row)
  float *dpad_k, *dpad_v;  // (row)
  float dlogit_scale;      // not yet multiplied by score_factor

  Backward(const WindowAttentionBackwardParams& params, Arena& arena)
      : sizes(params.forward),
        window(params.forward, arena),
        bias(params.forward, sizes, arena),
        axes(params.forward, sizes, arena) {
    int64_t** const offsets[] = {&q_offsets,  &k_offsets,  &v_offsets, &dout_offsets,
                                 &dq_offsets, &dk_offsets, &dv_offsets};
    for (int64_t** map : offsets) *map = arena.take<int64_t>(sizes.keys);
    float** const of_window[] = {&k, &v, &dk, &dv};
    for (float** rows : of_window) *rows = arena.take<float>(round_up(sizes.keys, kLanes) * sizes.row);
    float** const of_block[] = {&q, &dout, &dq, &q_t, &dout_t};
    for (float** rows : of_block) *rows = arena.take<float>(sizes.block * sizes.row);
    scores = arena.take<float>(sizes.scores() + kLanes);
    dscores = arena.take<float>(sizes.scores() + kLanes);
    lse = arena.take<float>(sizes.block);
    inverse_q_norms = arena.take<float>(sizes.block);
    inverse_k_norms = arena.take<float>(round_up(sizes.keys, kLanes));
    if (params.dbias != nullptr || (params.dbias_table != nullptr && sizes.blocks == 1)) {
      dbias = arena.take<float>(sizes.blocks * sizes.scores() + kLanes);
    }
    dcolumn = arena.take<float>(params.dbias_table != nullptr ? sizes.table_rows + kLanes : 0);
    daxis_tables = arena.take<float>(axes.rows() * sizes.row);
    dpad_k = arena.take<float>(sizes.row);
    dpad_v = arena.take<float>(sizes.row);
  }
};

SWINKERNELS_INLINE void clear(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0.0f;
}

// Replaces `scores` by the probabilities, and `dscores`, which holds dP, by the gradient of the scores. Adds this
// gradient to dbias unless dbias is null.
void softmax_backward(const Sizes& sizes, int64_t queries, const float* lse, float* scores, float* dscores,
                      float* dbias) {
  for (int64_t i = 0; i < queries; i += kLanes) {
    const Vec log_sum = load(lse + i);
    Vec sum = {}, delta = {};
    for (int64_t first = 0; first < sizes.keys; first += kSummedKeys) {
      Vec part = {}, delta_part = {};
      for (int64_t key = first; key < smaller(first + kSummedKeys, sizes.keys); ++key) {
        float* at = scores + key * sizes.block + i;
        const Vec probability = exp(load(at) - log_sum);
        store(at, probability);
        part += probability;
        delta_part += probability * load(dscores + key * sizes.block + i);
      }
      sum += part;
      delta += delta_part;
    }
    // The sum is 1 except for the rounding of lse, which is several eps if lse is large. All keys share this error, so
    // without a correction the sum of dS over the keys would not be zero. For a pad query the sum is 0.
    const Vec normalise = sum == Vec{} ? Vec{} : 1.0f / sum;
    delta *= normalise;
    for (int64_t key = 0; key < sizes.keys; ++key) {
      const int64_t at = key * sizes.block + i;
      const Vec probability = load(scores + at) * normalise;
      const Vec gradient = probability * (load(dscores + at) - delta);
      store(scores + at, probability);
      store(dscores + at, gradient);
      if (dbias != nullptr) store(dbias + at, load(dbias + at) + gradient);
    }
  }
}

// Adds the rows of the window's pad keys, times `factor`, to `sum`, in the order of the keys.
void add_pad_rows(const Sizes& sizes, const int64_t* offsets, float factor, const float* rows, float* sum) {
  for (int64_t i = 0; i < sizes.keys; ++i) {
    if (offsets[i] != kPad) continue;
    for (int64_t c = 0; c < sizes.row; c += kLanes) {
      store(sum + c, load(sum + c) + load(rows + i * sizes.row + c) * factor);
    }
  }
}

// Computes the gradients of one window and head. dk and dv go to the maps or, if windows share keys, to dkv (2, keys,
// head_dim).
void backward_window(const WindowAttentionBackwardParams& params, Backward& s, int64_t index, int64_t head,
                     float factor, float* dkv) {
  const WindowAttentionForwardParams& p = params.forward;
  const Sizes& sizes = s.sizes;
  s.window.move_to(index);
  s.window.offsets(p.q, s.q_offsets);
  s.window.key_offsets(p.k, s.k_offsets);
  s.window.key_offsets(p.v, s.v_offsets);
  s.window.offsets(params.dout, s.dout_offsets);
  s.window.offsets(params.dq, s.dq_offsets);
  s.window.key_offsets(params.dk, s.dk_offsets);
  s.window.key_offsets(params.dv, s.dv_offsets);
  gather(p.dtype, p.k, s.k_offsets, 0, sizes.keys, head, pad_row(p, 1, head), sizes, s.k);
  gather(p.dtype, p.v, s.v_offsets, 0, sizes.keys, head, pad_row(p, 2, head), sizes, s.v);
  if (p.logit_scale != nullptr) normalise_rows(sizes, sizes.keys, s.k, s.inverse_k_norms);
  const float* lse = p.lse + (index * p.num_heads + head) * sizes.tokens;
  Vec dlogit_scale = {};

  for (int64_t b = 0; b < sizes.blocks; ++b) {
    const int64_t first = b * sizes.block, queries = sizes.queries(b), width = round_up(queries, kLanes);
    gather(p.dtype, p.q, s.q_offsets, first, queries, head, pad_row(p, 0, head), sizes, s.q);
    gather(p.dtype, params.dout, s.dout_offsets, first, queries, head, nullptr, sizes, s.dout);
    if (p.logit_scale != nullptr) normalise_rows(sizes, queries, s.q, s.inverse_q_norms);
    const float* start = start_scores(sizes, s.bias, s.axes, s.window.bias_type, head, b, factor, s.q, s.q_t, s.scores);
    transpose_rows(sizes, queries, s.dout, 1.0f, s.dout_t);
    // A pad query has probability 0 for every key: its output is discarded, and its lse is undefined.
    for (int64_t i = 0; i < width; ++i) {
      const bool is_pad = i >= queries || s.dout_offsets[first + i] == kPad;
      s.lse[i] = is_pad ? __builtin_inff() : lse[first + i];
    }

    compute_scores(p, sizes, s.window, s.k, s.q_t, start, b, s.scores);
    matmul<false>(sizes.keys, width, sizes.dim, s.v, sizes.row, s.dout_t, sizes.block, nullptr, s.dscores, sizes.block);
    softmax_backward(sizes, queries, s.lse, s.scores, s.dscores,
                     s.dbias == nullptr ? nullptr : s.dbias + b * sizes.scores());
    if (params.dbias_table != nullptr && s.dbias == nullptr) s.bias.add_table_gradient(s.dscores, b, s.dcolumn);

    matmul<false>(sizes.keys, sizes.row, queries, s.scores, sizes.block, s.dout, sizes.row, b == 0 ? nullptr : s.dv,
                  s.dv, sizes.row);
    matmul<false>(sizes.keys, sizes.row, queries, s.dscores, sizes.block, s.q, sizes.row, b == 0 ? nullptr : s.dk, s.dk,
                  sizes.row);
    matmul<true>(queries, sizes.row, sizes.keys, s.dscores, sizes.block, s.k, sizes.row, nullptr, s.dq, sizes.row);
    if (p.logit_scale != nullptr) {
      dlogit_scale += normalise_rows_backward(sizes, queries, s.q, s.inverse_q_norms, s.dq);
    }
    float factor_of_dq = factor;
    if (s.axes.given()) {
      for (int64_t i = 0; i < queries * sizes.row; i += kLanes) store(s.dq + i, load(s.dq + i) * factor);
      s.axes.add_gradients(b, s.dscores, s.q, s.dq, s.daxis_tables);
      factor_of_dq = 1.0f;
    }
    scatter(p.dtype, params.dq, s.dq_offsets, first, queries, head, sizes, [&](int64_t) { return factor_of_dq; }, s.dq);
  }

  if (p.logit_scale != nullptr) {
    normalise_rows_backward(sizes, sizes.keys, s.k, s.inverse_k_norms, s.dk);
    for (int lane = 0; lane < kLanes; ++lane) s.dlogit_scale += dlogit_scale[lane];
  }
  if (dkv == nullptr) {
    scatter(p.dtype, params.dk, s.dk_offsets, 0, sizes.keys, head, sizes, [&](int64_t) { return factor; }, s.dk);
    scatter(p.dtype, params.dv, s.dv_offsets, 0, sizes.keys, head, sizes, [](int64_t) { return 1.0f; }, s.dv);
  } else {
    for (int64_t key = 0; key < sizes.keys; ++key) {
      for (int64_t c = 0; c < sizes.dim; ++c) {
        dkv[key * sizes.dim + c] = factor * s.dk[key * sizes.row + c];
        dkv[(sizes.keys + key) * sizes.dim + c] = s.dv[key * sizes.row + c];
      }
    }
  }
  if (params.dpad_qkv != nullptr && s.window.padded) {
    add_pad_rows(sizes, s.k_offsets, factor, s.dk, s.dpad_k);
    add_pad_rows(sizes, s.v_offsets, 1.0f, s.dv, s.dpad_v);
  }
}

void backward(const WindowAttentionBackwardParams& params, const BackwardPartition& partition, int64_t begin,
              int64_t end, void* scratch) {
  const WindowAttentionForwardParams& p = params.forward;
  Arena arena(scratch);
  Backward s(params, arena);
  const Sizes& sizes = s.sizes;
  const int64_t windows = product(p.geometry.num_windows), windows_of_type = windows / p.bias_types;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t head = chunk % p.num_heads, window_chunk = chunk / p.num_heads;
    const int64_t type = window_chunk / partition.chunks_per_type;
    const int64_t first = window_chunk % partition.chunks_per_type * partition.windows_per_chunk;
    const int64_t last = smaller(first + partition.windows_per_chunk, partition.windows_per_type);
    const float factor = score_factor(p, head);
    if (params.dbias_table != nullptr) clear(s.dcolumn, sizes.table_rows + kLanes);
    if (s.dbias != nullptr) clear(s.dbias, sizes.blocks * sizes.scores());
    clear(s.daxis_tables, s.axes.rows() * sizes.row);
    clear(s.dpad_k, sizes.row);
    clear(s.dpad_v, sizes.row);
    s.dlogit_scale = 0.0f;
    for (int64_t i = first; i < last; ++i) {
      const int64_t index = i / windows_of_type * windows + type * windows_of_type + i % windows_of_type;
      float* dkv = partition.dkv == nullptr ? nullptr
                                            : partition.dkv + (index * p.num_heads + head) * 2 * sizes.keys * sizes.dim;
      backward_window(params, s, index, head, factor, dkv);
    }
    if (partition.dbias_table != nullptr) {
      if (s.dbias != nullptr) s.bias.add_table_gradient(s.dbias, 0, s.dcolumn);
      float* to = partition.dbias_table + chunk * sizes.table_rows;
      for (int64_t i = 0; i < sizes.table_rows; ++i) to[i] = s.dcolumn[i];
    }
    if (partition.dbias != nullptr) {
      s.bias.write_dense_gradient(s.dbias, partition.dbias + chunk * sizes.tokens * sizes.keys);
    }
    if (partition.daxis_tables != nullptr) {
      float* to = partition.daxis_tables + chunk * s.axes.rows() * sizes.dim;
      for (int64_t r = 0; r < s.axes.rows(); ++r) {
        for (int64_t c = 0; c < sizes.dim; ++c) *to++ = s.daxis_tables[r * sizes.row + c];
      }
    }
    if (partition.dlogit_scale != nullptr) partition.dlogit_scale[chunk] = s.dlogit_scale;
    if (partition.dpad_kv != nullptr) {
      float* to = partition.dpad_kv + chunk * 2 * sizes.dim;
      for (int64_t c = 0; c < sizes.dim; ++c) to[c] = s.dpad_k[c];
      for (int64_t c = 0; c < sizes.dim; ++c) to[sizes.dim + c] = s.dpad_v[c];
    }
  }
}

#include "key_windows.inl"

int64_t forward_scratch_bytes(const WindowAttentionForwardParams& p) {
  Arena arena(nullptr);
  Forward s(p, arena);
  return arena.bytes();
}

int64_t backward_scratch_bytes(const WindowAttentionBackwardParams& params) {
  Arena arena(nullptr);
  Backward s(params, arena);
  return arena.bytes();
}

[[maybe_unused]] constexpr WindowAttentionKernels kWindowAttentionKernels = {
    forward_scratch_bytes, backward_scratch_bytes, forward, backward, sum_key_gradients};

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
