// Linear layers, and MLPs of two with GELU between them, for one instruction set and format; see simd.inl and panels.inl
// for how this is compiled. Sums, biases, norms, GELU and residual sums are float32 in either format.
//
// Layout    A panel is up to kPanelRows rows of a map, transposed, so that each vector holds one unit or one channel of
//           kLanes rows. A product multiplies vectors of the panel of x by single units of the weight and yields a panel
//           of the result: a weight is read where it lies, or in slices if its numbers are widened, and needs no other
//           layout. In an MLP the panel of fc1's result, as units, is the one that fc2 reads. Only x and the final
//           result are transposed.
// Tail      The last vector of the last panel would often be nearly empty: 49 rows are three vectors of 16 and one row. If
//           at most kMaxTail rows are left, they are multiplied with the weight's rows in the lanes instead, by
//           transposing the weight in registers. That takes about a third of the time for one row of 16 lanes. There is
//           no tail with tiles, which add products in another order.
// Tiling    The rows are divided into blocks, whose panels share each slice of the weight, kColumns by kDepth, while the
//           slice is in L2 and a panel's part of kDepth units in L1. An MLP computes kHidden hidden channels of a
//           block at a time, so that its hidden layer stays in the cache. If there are few blocks, a Linear layer's
//           columns are divided into tasks, too.
// Work      One multiplication and addition for each row and unit of the weights, with the rows rounded up to whole
//           vectors. With 8 lanes, that takes 0.25 instructions each; the transposes and the bias take about 1 instruction
//           per element of x and 3 per element of the result, and GELU 6.
#pragma once
#include "panels.inl"

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

constexpr int64_t kPanelRows = (kHasTiles ? 2 : kTileVectors) * kLanes;
// The size of a block is a multiple of this. Only without tiles does a narrow panel take as long as a whole one.
constexpr int64_t kRowStep = kHasTiles ? kLanes : kPanelRows;
constexpr int64_t kMaxTail = kHasTiles ? 0 : kLanes / 4;
constexpr int64_t kMaxBlockRows = kHasTiles ? 256 : 128;
constexpr int64_t kMaxBlockFloats = 512 << 10;  // of x, for a Linear layer with many input channels
// Whole slices of kDepth units, so that a single pass of an MLP adds the products of fc2 in the same order as by layers.
constexpr int64_t kHidden = 256 * kNumbers;
static_assert(kHidden % (kDepth * kNumbers) == 0);
// An MLP's block has this many floats of x, of its result and of kHidden hidden channels, so that they stay in L2.
constexpr int64_t kMlpBlockFloats = (kHasTiles ? 288 : 96) << 10;
// A call has about this many tasks if it is large enough, for any number of threads.
constexpr int64_t kTasks = 128;

// The division of `rows` rows into blocks of nearly the same size, which is a multiple of kRowStep.
struct Blocks {
  int64_t rows, count, size;

  Blocks(int64_t all_rows, int64_t largest) : rows(all_rows) {
    count = (rows + largest - 1) / largest;
    size = count == 0 ? 0 : round_up((rows + count - 1) / count, kRowStep);
    count = size == 0 ? 0 : (rows + size - 1) / size;
  }
};

// The rows of one block: those of its panels, of which the last may have fewer, and the tail.
struct Block {
  int64_t first, rows, tail, panels;

  Block(const Blocks& blocks, int64_t index) {
    first = index * blocks.size;
    const int64_t all = smaller(blocks.size, blocks.rows - first), over = all % kLanes;
    tail = over <= kMaxTail ? over : 0;
    rows = all - tail;
    panels = (rows + kPanelRows - 1) / kPanelRows;
  }
  int64_t rows_of(int64_t panel) const { return smaller(kPanelRows, rows - panel * kPanelRows); }
  // The number of rows rounded up to whole vectors, which is the distance between a panel's channels.
  int64_t width_of(int64_t panel) const { return round_up(rows_of(panel), kLanes); }
};

// Memory for the panels of a block, each of which has a `height` in channels or units, and for the tail, which is not
// transposed except while its rows are normalised.
struct Panels {
  float *data, *tail, *packed_tail;
  int64_t height, tail_stride;

  Panels(const Blocks& blocks, int64_t panel_height, bool normalises, Arena& arena)
      : height(panel_height), tail_stride(round_up(panel_height, kLanes)) {
    data = arena.take<float>(blocks.size * height);
    tail = arena.take<float>(kMaxTail * tail_stride);
    packed_tail = arena.take<float>(normalises && kMaxTail > 0 ? kLanes * height : 0);
  }
  float* at(int64_t panel) const { return data + panel * kPanelRows * height; }
  float* tail_row(int64_t row) const { return tail + row * tail_stride; }
};

// Replaces a block's rows, in panels of PanelUnits, by their layer norms.
template <class PanelUnits>
void normalise_block(const RowNorm<Element>& norm, int64_t channels, const Block& block, const Panels& panels) {
  for (int64_t i = 0; i < block.panels; ++i) {
    normalise<PanelUnits>(norm, channels, block.width_of(i), panels.at(i), block.width_of(i));
  }
  if (block.tail == 0) return;
  const int64_t height = channels / PanelUnits::kNumbers;
  pack([&](int64_t r) { return panels.tail_row(r); }, block.tail, height, panels.packed_tail, kLanes);
  normalise<PanelUnits>(norm, channels, kLanes, panels.packed_tail, kLanes);
  for (int64_t r = 0; r < block.tail; ++r) {
    for (int64_t i = 0; i < height; ++i) panels.tail_row(r)[i] = panels.packed_tail[i * kLanes + r];
  }
}

// Packs a block's rows of x, which are `stride` apart, as units.
void pack_rows(const Element* x, int64_t stride, const Block& block, const Panels& panels) {
  for (int64_t i = 0; i < block.panels; ++i) {
    const Element* first = x + (block.first + i * kPanelRows) * stride;
    pack([&](int64_t r) { return first + r * stride; }, block.rows_of(i), panels.height, panels.at(i),
         block.width_of(i));
  }
  for (int64_t r = 0; r < block.tail; ++r) {
    const Element* row = x + (block.first + block.rows + r) * stride;
    for (int64_t u = 0; u < panels.height; ++u) panels.tail_row(r)[u] = load_unit(row + u * kNumbers);
  }
}

// Finds where the pieces of up to kPanelRows patches lie in the map.
struct PatchRows {
  const Patches& p;
  const Element* zeros;  // a piece outside the map
  bool is_padded = false;
  int64_t grid[3];
  const Element* starts[kPanelRows];
  int64_t tokens[kPanelRows][3];  // the first of each block

  PatchRows(const Patches& patches, const Element* of_zeros) : p(patches), zeros(of_zeros) {
    for (int i = 0; i < 3; ++i) {
      grid[i] = (p.size[i] + p.factor[i] - 1) / p.factor[i];
      is_padded = is_padded || p.size[i] % p.factor[i] != 0;
    }
  }
  // Finds the blocks of rows [first, first + count).
  void move_to(const Element* x, int64_t first, int64_t count) {
    int64_t at[3], image = first;
    for (int i = 2; i >= 0; --i) {
      at[i] = image % grid[i];
      image /= grid[i];
    }
    for (int64_t r = 0; r < count; ++r) {
      starts[r] = x + image * p.image_stride;
      for (int i = 0; i < 3; ++i) {
        tokens[r][i] = at[i] * p.factor[i];
        starts[r] += tokens[r][i] * p.strides[i];
      }
      if (++at[2] < grid[2]) continue;
      at[2] = 0;
      if (++at[1] < grid[1]) continue;
      at[1] = 0;
      if (++at[0] < grid[0]) continue;
      at[0] = 0;
      ++image;
    }
  }
  const Element* piece(int64_t r, const Patches::Piece& of) const {
    if (is_padded) {
      for (int i = 0; i < 3; ++i) {
        if (tokens[r][i] + of.at[i] >= p.size[i]) return zeros;
      }
    }
    return starts[r] + of.offset;
  }
};

// Packs a block's rows, which are patches, as units.
void pack_patches(const Element* x, PatchRows& rows, const Block& block, const Panels& panels) {
  const Patches& p = rows.p;
  const int64_t units = p.length / kNumbers;
  for (int64_t i = 0; i < block.panels; ++i) {
    const int64_t width = block.width_of(i);
    rows.move_to(x, block.first + i * kPanelRows, block.rows_of(i));
    for (int64_t n = 0; n < p.count; ++n) {
      pack([&](int64_t r) { return rows.piece(r, p.pieces[n]); }, block.rows_of(i), units,
           panels.at(i) + n * units * width, width);
    }
  }
  rows.move_to(x, block.first + block.rows, block.tail);
  for (int64_t r = 0; r < block.tail; ++r) {
    for (int64_t n = 0; n < p.count; ++n) {
      const Element* piece = rows.piece(r, p.pieces[n]);
      for (int64_t u = 0; u < units; ++u) panels.tail_row(r)[n * units + u] = load_unit(piece + u * kNumbers);
    }
  }
}

// Multiplies `count` rows of a weight, which are `stride` apart, by kRows rows of x, for `depth` units. Row r of the
// products is y + r * y_stride and has room for `count` rounded up to whole vectors; if `adds`, the products are added to
// it. Each sum adds the same products in the same order as in a panel, so a row's result does not depend on its place.
template <int kRows>
void multiply_rows(const Units::Element* weight, int64_t stride, int64_t count, int64_t depth, const float* x,
                   int64_t x_stride, float* y, int64_t y_stride, bool adds) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const Units::Element* from[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) from[i] = weight + smaller(c + i, count - 1) * stride;
    Vec sums[kRows] = {};
    int64_t u = 0;
    for (; u + kLanes <= depth; u += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load_units(from[i] + u * kNumbers);
      exchange_rows<1>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          sums[r] = Units::add_products(sums[r], splat(x[r * x_stride + u + i]), block[i]);
        }
      }
    }
    for (; u < depth; ++u) {
      float column[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) column[i] = load_unit(from[i] + u * kNumbers);
      for (int r = 0; r < kRows; ++r) {
        sums[r] = Units::add_products(sums[r], splat(x[r * x_stride + u]), load(column));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float* at = y + r * y_stride + c;
      store(at, adds ? sums[r] + load(at) : sums[r]);
    }
  }
}

template <int kRows, class... Arguments>
SWINKERNELS_INLINE void multiply_tail(int64_t rows, Arguments... arguments) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_tail<kRows - 1>(rows, arguments...);
  }
  multiply_rows<kRows>(arguments...);
}

// Multiplies `count` rows of the weight from row `first` on, and their units [unit, unit + depth), by units
// [x_unit, x_unit + depth) of x. The products are channels [y_channel, y_channel + count) of y, or, if `adds`, are added
// to them.
void multiply(const Layer& layer, int64_t first, int64_t count, int64_t unit, int64_t depth, const Block& block,
              const Panels& x, int64_t x_unit, const Panels& y, int64_t y_channel, bool adds, float* memory) {
  const Slice<Stored, Units> slice(layer, first, count, unit, depth, memory);
  for (int64_t i = 0; i < block.panels; ++i) {
    const int64_t width = block.width_of(i);
    float* sums = y.at(i) + y_channel * width;
    matmul_fetching<Units>(count, width, depth, slice.data(), slice.stride(), x.at(i) + x_unit * width, width,
                           adds ? sums : nullptr, sums, width, slice.fetch(i, block.panels));
  }
  if constexpr (kMaxTail > 0) {
    if (block.tail == 0) return;
    multiply_tail<kMaxTail>(block.tail, slice.data(), slice.stride(), count, depth, x.tail + x_unit, x.tail_stride,
                            y.tail + y_channel, y.tail_stride, adds);
  }
}

// Channels [0, count) of y = rows [first, first + count) of the weight, times x.
void multiply_all(const Layer& layer, int64_t first, int64_t count, const Block& block, const Panels& x,
                  const Panels& y, float* memory) {
  const int64_t units = layer.in_features / kNumbers;
  for (int64_t c = 0; c < count; c += kColumns) {
    int64_t u = 0;
    do {  // once if there are no input channels
      multiply(layer, first + c, smaller(kColumns, count - c), u, smaller(kDepth, units - u), block, x, u, y, c, u > 0,
               memory);
      u += kDepth;
    } while (u < units);
  }
}

// Returns `count` biases from that of `channel` on.
SWINKERNELS_INLINE Vec biases_of(const Layer& layer, int64_t channel, int64_t count) {
  return layer.bias == nullptr ? Vec{} : load_part(layer.bias + channel, count);
}

// Replaces channels [0, count) of y, which are the layer's channels from `first` on, by activation(y + bias), as
// PanelUnits. The units of two channels take the place of channels that have been read before.
template <Activation kActivation, class PanelUnits>
void activate_all(const Layer& layer, int64_t first, int64_t count, const Block& block, const Panels& y) {
  constexpr int kOfUnit = PanelUnits::kNumbers;
  for (int64_t i = 0; i < block.panels; ++i) {
    const int64_t width = block.width_of(i);
    for (int64_t c = 0; c < count; c += kOfUnit) {
      Vec bias[kOfUnit];
      for (int n = 0; n < kOfUnit; ++n) bias[n] = bias_of(layer, first + c + n);
      for (int64_t v = 0; v < width; v += kLanes) {
        float* at = y.at(i) + v;
        Vec x[kOfUnit];
        for (int n = 0; n < kOfUnit; ++n) x[n] = activate(load(at + (c + n) * width) + bias[n], kActivation);
        store(at + c / kOfUnit * width, PanelUnits::join(x));
      }
    }
  }
  for (int64_t r = 0; r < block.tail; ++r) {
    for (int64_t c = 0; c < count; c += kLanes) {
      float* row = y.tail_row(r);
      const Vec x = activate(load(row + c) + biases_of(layer, first + c, smaller(kLanes, count - c)), kActivation);
      PanelUnits::store(row + c / kOfUnit, x);
    }
  }
}

// out = residual + activation(y + bias) for a block's rows of out and of the residual, which may be null, and channels
// [0, count) of y, which are the layer's channels from `first` on.
template <Activation kActivation>
void unpack_block(const Layer& layer, int64_t first, int64_t count, const Block& block, const Panels& y,
                  const Element* residual, Element* out) {
  const int64_t stride = layer.out_features;
  for (int64_t i = 0; i < block.panels; ++i) {
    const int64_t at = (block.first + i * kPanelRows) * stride + first;
    unpack<kActivation>(layer, first, count, y.at(i), block.width_of(i), block.rows_of(i), [&](int64_t r) {
      return Place{out + at + r * stride, residual == nullptr ? nullptr : residual + at + r * stride};
    });
  }
  for (int64_t r = 0; r < block.tail; ++r) {
    for (int64_t c = 0; c < count; c += kLanes) {
      const int64_t at = (block.first + block.rows + r) * stride + first + c, channels = smaller(kLanes, count - c);
      const Vec x = activate(load(y.tail_row(r) + c) + biases_of(layer, first + c, channels), kActivation);
      store_part(out + at, channels, residual == nullptr ? x : load_part(residual + at, channels) + x);
    }
  }
}

// Returns the number of rows of the largest block: whole panels of at most this many floats and kMaxBlockRows rows, but
// at least one panel.
int64_t block_rows(int64_t floats, int64_t channels) {
  const int64_t rows = floats / (channels == 0 ? 1 : channels) / kPanelRows * kPanelRows;
  return rows < kPanelRows ? kPanelRows : smaller(rows, kMaxBlockRows);
}

// ---- One Linear layer ----

// A task is `columns` channels of the result, for one block.
struct LinearTasks {
  Blocks blocks;
  int64_t columns, per_block, count;

  explicit LinearTasks(const LinearParams<Element>& p)
      : blocks(p.rows, block_rows(kMaxBlockFloats, p.layer.in_features / kNumbers)) {
    const int64_t slices = (p.layer.out_features + kColumns - 1) / kColumns;
    const int64_t wanted = 1 + kTasks / (1 + blocks.count);  // tasks of a block, if it has as many slices
    columns = (slices + wanted - 1) / wanted * kColumns;
    per_block = columns == 0 ? 0 : (p.layer.out_features + columns - 1) / columns;
    count = blocks.count * per_block;
  }
};

struct LinearScratch {
  Panels x, y;
  Element* zeros;
  float* slice;

  LinearScratch(const LinearParams<Element>& p, const Blocks& blocks, Arena& arena)
      : x(blocks, p.layer.in_features / kNumbers, p.norm.given, arena),
        y(blocks, kColumns, false, arena),
        zeros(arena.take<Element>(p.patches.count > 0 ? p.patches.length : 0)),
        slice(arena.take<float>(kSliceFloats)) {}
};

template <Activation kActivation>
void linear_as(const LinearParams<Element>& p, int64_t* next, void* memory) {
  const Layer& layer = p.layer;
  const LinearTasks tasks(p);
  [[maybe_unused]] const TileRegisters tiles;
  Arena arena(memory);
  const LinearScratch s(p, tasks.blocks, arena);
  PatchRows patches(p.patches, s.zeros);
  if (patches.is_padded) {
    for (int64_t i = 0; i < p.patches.length; ++i) s.zeros[i] = 0;
  }
  int64_t packed = -1;
  for (;;) {
    const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (task >= tasks.count) return;
    const Block block(tasks.blocks, task / tasks.per_block);
    if (block.first != packed) {
      packed = block.first;
      if (p.patches.count > 0) {
        pack_patches(p.x, patches, block, s.x);
      } else {
        pack_rows(p.x, p.x_stride, block, s.x);
      }
      if (p.norm.given) normalise_block<Stored>(p.norm, layer.in_features, block, s.x);
    }
    const int64_t begin = task % tasks.per_block * tasks.columns;
    const int64_t end = smaller(begin + tasks.columns, layer.out_features);
    for (int64_t c = begin; c < end; c += kColumns) {
      const int64_t count = smaller(kColumns, end - c);
      multiply_all(layer, c, count, block, s.x, s.y, s.slice);
      unpack_block<kActivation>(layer, c, count, block, s.y, p.residual, p.out);
    }
  }
}

// ---- Two Linear layers with GELU between them ----

// Returns about the same number of blocks for each thread.
Blocks mlp_blocks(const MlpParams<Element>& p) {
  const int64_t channels = p.fc1.in_features / kNumbers + p.fc2.out_features + kHidden;
  const int64_t most = block_rows(kMlpBlockFloats, channels), of_thread = (p.rows + p.threads - 1) / p.threads;
  const int64_t blocks = (of_thread + most - 1) / most;
  return Blocks(p.rows, round_up((of_thread + blocks - 1) / blocks, kRowStep));
}

struct MlpScratch {
  Panels x, hidden, y;
  float* slice;

  MlpScratch(const MlpParams<Element>& p, const Blocks& blocks, Arena& arena)
      : x(blocks, p.fc1.in_features / kNumbers, p.norm.given, arena),
        hidden(blocks, kHidden, false, arena),
        y(blocks, round_up(p.fc2.out_features, kLanes), p.post_norm.given, arena),
        slice(arena.take<float>(kSliceFloats)) {}
};

template <Activation kActivation>
void mlp_as(const MlpParams<Element>& p, int64_t* next, void* memory) {
  const Blocks blocks = mlp_blocks(p);
  [[maybe_unused]] const TileRegisters tiles;
  Arena arena(memory);
  const MlpScratch s(p, blocks, arena);
  const int64_t out = p.fc2.out_features;
  for (;;) {
    const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (task >= blocks.count) return;
    const Block block(blocks, task);
    pack_rows(p.x, p.x_stride, block, s.x);
    if (p.norm.given) normalise_block<Stored>(p.norm, p.fc1.in_features, block, s.x);
    int64_t h = 0;
    do {  // once if there are no hidden channels
      const int64_t depth = smaller(kHidden, p.fc1.out_features - h);
      multiply_all(p.fc1, h, depth, block, s.x, s.hidden, s.slice);
      activate_all<kActivation, Stored>(p.fc1, h, depth, block, s.hidden);
      Layer part = p.fc2;  // the channels of this pass, so that the slice after the last one is that of the next rows
      part.weight += h;
      part.in_features = depth;
      const int64_t units = depth / kNumbers;
      for (int64_t c = 0; c < out; c += kColumns) {
        int64_t u = 0;
        do {
          multiply(part, c, smaller(kColumns, out - c), u, smaller(kDepth, units - u), block, s.hidden, u, s.y, c,
                   h > 0 || u > 0, s.slice);
          u += kDepth;
        } while (u < units);
      }
      h += kHidden;
    } while (h < p.fc1.out_features);
    Layer fc2 = p.fc2;
    if (p.post_norm.given) {
      activate_all<Activation::kNone, Float32Units>(fc2, 0, out, block, s.y);  // adds the bias
      normalise_block<Float32Units>(p.post_norm, out, block, s.y);
      fc2.bias = nullptr;
    }
    unpack_block<Activation::kNone>(fc2, 0, out, block, s.y, p.residual, p.out);
  }
}

// ---- The layer norm of rows ----

float* norm_panel(const NormParams<Element>& p, Arena& arena) {
  return arena.take<float>(round_up(p.channels, kLanes) * kLanes);
}

// Turns the panel of units that takes the last part of a panel (channels, kLanes) into the panel of channels.
void split_panel(int64_t channels, float* panel) {
  if constexpr (kNumbers > 1) {
    const int64_t units = channels / kNumbers;
    for (int64_t u = 0; u < units; ++u) {
      Vec numbers[kNumbers];
      Units::split(load(panel + (channels - units + u) * kLanes), numbers);
      for (int64_t i = 0; i < kNumbers; ++i) store(panel + (u * kNumbers + i) * kLanes, numbers[i]);
    }
  }
}

// A task is a vector of rows.
void norm(const NormParams<Element>& p, int64_t* next, void* memory) {
  Arena arena(memory);
  float* panel = norm_panel(p, arena);
  const int64_t channels = p.channels, units = channels / kNumbers;
  for (;;) {
    const int64_t first = kLanes * __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (first >= p.rows) return;
    const int64_t rows = smaller(kLanes, p.rows - first);
    pack([&](int64_t r) { return p.x + (first + r) * channels; }, rows, units, panel + (channels - units) * kLanes,
         kLanes);
    split_panel(channels, panel);
    normalise<Float32Units>(p.norm, channels, kLanes, panel, kLanes);
    unpack<Activation::kNone>({}, 0, channels, panel, kLanes, rows, [&](int64_t r) {
      const int64_t at = (first + r) * channels;
      return Place{p.out + at, p.residual == nullptr ? nullptr : p.residual + at};
    });
  }
}

// ---- The interface ----

int64_t norm_tasks(const NormParams<Element>& p) { return (p.rows + kLanes - 1) / kLanes; }
int64_t linear_tasks(const LinearParams<Element>& p) { return LinearTasks(p).count; }
int64_t mlp_tasks(const MlpParams<Element>& p) { return mlp_blocks(p).count; }

int64_t linear_scratch_bytes(const LinearParams<Element>& p) {
  Arena arena(nullptr);
  LinearScratch(p, LinearTasks(p).blocks, arena);
  return arena.bytes();
}

int64_t mlp_scratch_bytes(const MlpParams<Element>& p) {
  Arena arena(nullptr);
  MlpScratch(p, mlp_blocks(p), arena);
  return arena.bytes();
}

int64_t norm_scratch_bytes(const NormParams<Element>& p) {
  Arena arena(nullptr);
  norm_panel(p, arena);
  return arena.bytes();
}

void linear(const LinearParams<Element>& p, int64_t* next, void* scratch) {
  switch (p.activation) {
    case Activation::kNone:
      return linear_as<Activation::kNone>(p, next, scratch);
    case Activation::kGelu:
      return linear_as<Activation::kGelu>(p, next, scratch);
    case Activation::kGeluTanh:
      return linear_as<Activation::kGeluTanh>(p, next, scratch);
  }
}

void mlp(const MlpParams<Element>& p, int64_t* next, void* scratch) {
  switch (p.activation) {
    case Activation::kNone:
      return mlp_as<Activation::kNone>(p, next, scratch);
    case Activation::kGelu:
      return mlp_as<Activation::kGelu>(p, next, scratch);
    case Activation::kGeluTanh:
      return mlp_as<Activation::kGeluTanh>(p, next, scratch);
  }
}

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
