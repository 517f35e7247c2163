// Panels: rows of a map, transposed, so that each vector holds one channel or one unit (see simd.inl) of kLanes rows. A
// panel is (channels, width) or (units, width), where the width is the number of rows rounded up to whole vectors; the
// functions that take a stride allow more room between its channels. The factors of a product are panels of units, and
// its sums are a panel of channels. In float32 both are the same.
//
// Before it includes this file, a source file defines
//   SWINKERNELS_TILES    defined for products in tiles
//   SWINKERNELS_UNITS    Float32Units, BFloat16Units, TiledUnits or WidenedUnits, for the format of all rows, weights and
//                        biases
#pragma once
#include "arena.inl"
#ifdef SWINKERNELS_TILES
#include "tiles.inl"
#endif

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

using Stored = SWINKERNELS_UNITS;  // in rows and weights
using Units = Stored::InPanel;     // in panels
using Format = Stored::Format;
using Element = Stored::Element;
constexpr int64_t kNumbers = Units::kNumbers;  // in a unit
constexpr bool kIsFloat32 = sizeof(Element) == sizeof(float);
using Layer = LinearLayer<Element>;
#ifdef SWINKERNELS_TILES
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
struct TileRegisters {};
#endif

SWINKERNELS_INLINE Vec load_elements(const Element* from) {
  return Format::widen(*reinterpret_cast<const Format::Memory*>(from));
}
SWINKERNELS_INLINE void store_elements(Element* to, Vec x) {
  *reinterpret_cast<Format::Memory*>(to) = Format::narrow(x);
}
[[maybe_unused]] SWINKERNELS_INLINE float widen(float x) { return x; }
[[maybe_unused]] SWINKERNELS_INLINE float widen(uint16_t bfloat16) {
  const uint32_t bits = uint32_t{bfloat16} << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// The products below read a weight in slices of kColumns rows and kDepth units. kColumns is a multiple of the tiles'
// heights and of kLanes, and a row of the result of a slice fills three cache lines.
constexpr int64_t kColumns = 48 * kNumbers;
// With 16 lanes, the part of a panel that a slice multiplies would not fit into L1 with 256 units, unless panels are as
// narrow as for tiles. With fewer lanes it would with more, but the rounding errors of a sum grow with its length.
constexpr int64_t kDepth = kLanes == 16 && !kHasTiles ? 128 : 256;

// Return a vector of consecutive units, and one unit, of a row in memory or of a row of units.
template <class From>
SWINKERNELS_INLINE Vec load_units(const From* from) {
  if constexpr (sizeof(From) == sizeof(float))
    return load(from);
  else
    return Stored::load(from);
}
template <class From>
SWINKERNELS_INLINE float load_unit(const From* from) {
  float unit;
  if constexpr (sizeof(From) == sizeof(float) || kNumbers > 1) {
    __builtin_memcpy(&unit, from, sizeof(unit));
  } else {
    unit = widen(*from);
  }
  return unit;
}

// panel (units, stride) = the transpose of row(0) ... row(rows - 1), which are pointers to `units` units.
template <class Row>
SWINKERNELS_INLINE void pack(Row row, int64_t rows, int64_t units, float* panel, int64_t stride) {
  using From = decltype(row(0));
  constexpr int64_t kUnit = sizeof(*From()) == sizeof(float) ? 1 : kNumbers;
  const int64_t width = round_up(rows, kLanes), whole = units / kLanes * kLanes;
  for (int64_t v = 0; v < width; v += kLanes) {
    From from[kLanes];  // the last row takes the place of rows that do not exist
    for (int64_t r = 0; r < kLanes; ++r) from[r] = row(smaller(v + r, rows - 1));
    for (int64_t u = 0; u < whole; u += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = load_units(from[r] + u * kUnit);
      exchange_rows<1>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(panel + (u + r) * stride + v, block[r]);
    }
    for (int64_t u = whole; u < units; ++u) {
      for (int64_t r = 0; r < kLanes; ++r) panel[u * stride + v + r] = load_unit(from[r] + u * kUnit);
    }
  }
}

// Sets `mean` to the mean of x - centre and `square` to that of its square, over the channels of a vector of rows.
template <class PanelUnits>
SWINKERNELS_INLINE void moments(Vec centre, const float* panel, int64_t channels, int64_t stride, Vec& mean,
                                Vec& square) {
  constexpr int kSums = 4;  // independent sums, which hide the latency of an addition
  const int64_t units = channels / PanelUnits::kNumbers;
  Vec sums[kSums] = {}, squares[kSums] = {};
  const auto add = [&](int64_t u, int i) __attribute__((always_inline)) {
    Vec numbers[PanelUnits::kNumbers];
    PanelUnits::split(load(panel + u * stride), numbers);
    for (const Vec number : numbers) {
      const Vec x = number - centre;
      sums[i] += x;
      squares[i] += x * x;
    }
  };
  int64_t u = 0;
  for (; u + kSums <= units; u += kSums) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) add(u + i, i);
  }
  for (; u < units; ++u) add(u, 0);
  mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(channels);
  square = ((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(channels);
}

// Replaces each row of a panel by its layer norm, for `width` rows; the panel consists of PanelUnits. No sum goes across a
// vector, and all rows are treated alike, so a row's result does not depend on its place. The second pass over the
// channels corrects the rounding of the mean, and finds the variance from differences that do not cancel.
template <class PanelUnits>
void normalise(const RowNorm<Element>& norm, int64_t channels, int64_t width, float* panel, int64_t stride) {
  for (int64_t v = 0; v < width; v += kLanes) {
    Vec about, rest, square;
    moments<PanelUnits>(Vec{}, panel + v, channels, stride, about, square);
    moments<PanelUnits>(about, panel + v, channels, stride, rest, square);
    const Vec mean = about + rest, rstd = 1.0f / sqrt(square - rest * rest + norm.eps);
    for (int64_t c = 0; c < channels; c += PanelUnits::kNumbers) {
      float* at = panel + c / PanelUnits::kNumbers * stride + v;
      Vec x[PanelUnits::kNumbers];
      PanelUnits::split(load(at), x);
      for (int i = 0; i < PanelUnits::kNumbers; ++i) {
        x[i] = (x[i] - mean) * rstd;
        if (norm.weight != nullptr) x[i] *= widen(norm.weight[c + i]);
        if (norm.bias != nullptr) x[i] += widen(norm.bias[c + i]);
      }
      store(at, PanelUnits::join(x));
    }
  }
}

// Returns GELU(x). The relative error is below 1e-6 for x >= -3; below, the absolute error is below 1e-8. For an infinity
// the result is the limit, where torch returns NaN for -infinity.
SWINKERNELS_INLINE Vec gelu(Vec x) {
  // GELU(x) = max(x, 0) - a Phi(-a), a = |x|, with Phi(-a) = exp(-p(a)). The polynomial p is a minimax fit for a <= 6,
  // with errors of p weighted by Phi(-a); above, it grows so fast that exp(-p(a)) < Phi(-6) until it is 0.
  const Vec magnitude = (Vec)((Bits)x & 0x7fffffff);
  const Vec a = magnitude < splat(16.0f) ? magnitude : splat(16.0f);  // an infinity times 0 would be NaN
  Vec p = splat(2.34366807e-8f);
  p = p * a + -6.7639707e-7f;
  p = p * a + 8.36855534e-6f;
  p = p * a + -5.67320832e-5f;
  p = p * a + 2.03868312e-4f;
  p = p * a + -1.46355763e-5f;
  p = p * a + -4.80455791e-3f;
  p = p * a + 3.63467034e-2f;
  p = p * a + 0.31830732f;
  p = p * a + 0.797884778f;
  p = p * a + 0.693147178f;
  return (x < Vec{} ? Vec{} : x) - a * exp(-p);  // NaN stays NaN
}

// Returns GELU(x) for a result that is rounded to bfloat16. The relative error is below 3e-4 for x >= -4 and below 5e-3,
// about half a unit in the last place of bfloat16, for x >= -6; below, the absolute error is below 1e-9. For -infinity the result is
// GELU(-12), -5e-35.
SWINKERNELS_INLINE Vec gelu_low(Vec x) {
  // As in gelu, but with Phi(-a) = 2^-p(a), and p fitted for a <= 6 with errors weighted by min(1, exp(6 - 1.5 a)).
  const Vec magnitude = (Vec)((Bits)x & 0x7fffffff);
  const Vec a = magnitude < splat(12.0f) ? magnitude : splat(12.0f);  // p(12) = 117
  Vec p = splat(2.4766105e-4f);
  p = p * a + -5.0573572e-3f;
  p = p * a + 4.5419625e-2f;
  p = p * a + 0.46826981f;
  p = p * a + 1.1470783f;
  p = p * a + 1.0002864f;
  return (x < Vec{} ? Vec{} : x) - a * exp2_low(-p);  // NaN stays NaN
}

// Returns x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) as x / (1 + exp(-2 sqrt(2 / pi) (...))).
SWINKERNELS_INLINE Vec gelu_tanh(Vec x) {
  const Vec low = x < splat(-16.0f) ? splat(-16.0f) : x;  // where the result is -3e-34; NaN stays NaN
  const Vec exponent = low * (low * low * -0.0713548162f + -1.59576912f);
  return low / (exp(exponent < splat(80.0f) ? exponent : splat(80.0f)) + 1.0f);
}

SWINKERNELS_INLINE Vec activate(Vec x, Activation activation) {
  if (activation == Activation::kGelu) return kIsFloat32 ? gelu(x) : gelu_low(x);
  return activation == Activation::kGeluTanh ? gelu_tanh(x) : x;
}

// Returns the part of the weight that follows, in a product, the slice of kColumns rows from `row` on and of kDepth units
// from `channel` on.
const Element* next_slice(const Layer& layer, int64_t row, int64_t channel) {
  constexpr int64_t kSlice = kDepth * kNumbers;
  const bool same_rows = channel + kSlice < layer.in_features, last = row + kColumns >= layer.out_features;
  const int64_t next_row = same_rows || last ? row : row + kColumns;
  return layer.weight + next_row * layer.row_stride + (same_rows ? channel + kSlice : 0);
}

// Room for a slice of a weight whose numbers are widened.
constexpr int64_t kSliceFloats = sizeof(Units::Element) == sizeof(Element) ? 0 : kColumns * kDepth;

// `count` rows of a weight, from the row `first` on, and their units from `unit` on, at most kColumns and kDepth, as a
// product reads them: where they lie or, if the units of a panel differ, widened in `memory`, which has kSliceFloats.
template <class InMemory, class InPanel>
struct Slice {
  float* units;

  Slice(const Layer& layer, int64_t first, int64_t count, int64_t unit, int64_t depth, float* memory) : units(memory) {
    const Element *weight = layer.weight + first * layer.row_stride + unit, *next = next_slice(layer, first, unit);
    for (int64_t r = 0; r < count; ++r) {
      const Element *from = weight + r * layer.row_stride, *fetched = next + r * layer.row_stride;
      float* to = units + r * kDepth;
      int64_t u = 0;
      for (; u + 2 * kLine <= depth; u += 2 * kLine) {
        __builtin_prefetch(fetched + u);
        for (int64_t i = u; i < u + 2 * kLine; i += kLanes) store(to + i, InMemory::load(from + i));
      }
      for (; u < depth; ++u) to[u] = widen(from[u]);
    }
  }
  const float* data() const { return units; }
  int64_t stride() const { return kDepth; }
  Fetch<float> fetch(int64_t, int64_t) const { return {}; }
};

template <class Same>
struct Slice<Same, Same> {
  const Element *weight, *following;
  int64_t row_stride, rows;

  Slice(const Layer& layer, int64_t first, int64_t count, int64_t unit, int64_t, float*)
      : weight(layer.weight + first * layer.row_stride + unit * kNumbers),
        following(next_slice(layer, first, unit * kNumbers)),
        row_stride(layer.row_stride),
        rows(count) {}
  const Element* data() const { return weight; }
  int64_t stride() const { return row_stride; }
  // The part of the next slice that the product with one of several panels fetches: in tiles an equal part each, else all
  // with the first panel.
  Fetch<Element> fetch(int64_t panel, int64_t panels) const {
    if (!kHasTiles) return panel == 0 ? Fetch<Element>{following, rows} : Fetch<Element>{};
    const int64_t first = rows * panel / panels;
    return {following + first * row_stride, rows * (panel + 1) / panels - first};
  }
};

// y (count, stride) = rows [first, first + count) of the layer's weight times the panel x of units, for `width` columns.
// `memory` is that of Slice.
void multiply_columns(const Layer& layer, int64_t first, int64_t count, const float* x, float* y, int64_t width,
                      int64_t stride, float* memory) {
  const int64_t units = layer.in_features / kNumbers;
  for (int64_t c = 0; c < count; c += kColumns) {
    int64_t u = 0;
    do {  // once if there are no input channels
      const int64_t columns = smaller(kColumns, count - c), depth = smaller(kDepth, units - u);
      const Slice<Stored, Units> slice(layer, first + c, columns, u, depth, memory);
      float* sums = y + c * stride;
      matmul_fetching<Units>(columns, width, depth, slice.data(), slice.stride(), x + u * stride, stride,
                             u > 0 ? sums : nullptr, sums, stride, slice.fetch(0, 1));
      u += kDepth;
    } while (u < units);
  }
}

SWINKERNELS_INLINE Vec bias_of(const Layer& layer, int64_t channel) {
  return splat(layer.bias == nullptr ? 0.0f : widen(layer.bias[channel]));
}

// Where a row of a result goes, and the row that is added to it, or null. Nothing is written if `out` is null.
struct Place {
  Element* out;
  const Element* residual;
};

// Returns or stores the first `count` lanes of a vector.
SWINKERNELS_INLINE Vec load_part(const Element* from, int64_t count) {
  float part[kLanes] = {};
  load_row<Format>(from, count, part);
  return load(part);
}
SWINKERNELS_INLINE void store_part(Element* to, int64_t count, Vec x) {
  Element part[kLanes];
  store_elements(part, x);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

// Writes activation(y + bias) for the panel y (count, stride), whose channels are the layer's channels from `first` on,
// to place(0) ... place(rows - 1), which begin at the channel `first`. y has room for `count` rounded up to whole
// vectors.
template <Activation kActivation, class PlaceOf>
SWINKERNELS_INLINE void unpack(const Layer& layer, int64_t first, int64_t count, const float* y, int64_t stride,
                               int64_t rows, PlaceOf place) {
  for (int64_t v = 0; v < rows; v += kLanes) {
    const int64_t last = smaller(kLanes, rows - v);
    Place places[kLanes];
    bool whole = last == kLanes;
    for (int64_t r = 0; r < last; ++r) {
      places[r] = place(v + r);
      whole = whole && places[r].out != nullptr;
    }
    for (int64_t c = 0; c < count; c += kLanes) {
      const int64_t channels = smaller(kLanes, count - c);
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const Vec bias = bias_of(layer, first + smaller(c + i, count - 1));
        block[i] = activate(load(y + (c + i) * stride + v) + bias, kActivation);
      }
      exchange_rows<1>(block);
      if (whole && channels == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          const Element* residual = places[r].residual;
          store_elements(places[r].out + c, residual == nullptr ? block[r] : load_elements(residual + c) + block[r]);
        }
        continue;
      }
      float part[kLanes][kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(part[r], block[r]);
      for (int64_t r = 0; r < last; ++r) {
        const auto [out, residual] = places[r];
        if (out == nullptr) continue;
        const Vec x = load(part[r]);
        store_part(out + c, channels, residual == nullptr ? x : load_part(residual + c, channels) + x);
      }
    }
  }
}

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
