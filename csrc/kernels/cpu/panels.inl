// Panels: rows of a map, transposed, so that each vector holds one channel of kLanes rows. A panel is (channels, width),
// where the width is the number of rows rounded up to whole vectors; the functions that take a stride allow more room
// between its channels.
#pragma once
#include "arena.inl"

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

// The products below read a weight in slices of kColumns rows and kDepth channels.
constexpr int64_t kColumns = 48;  // a multiple of the tiles' heights and of kLanes
// With 16 lanes, the part of a panel that a slice multiplies would not fit into L1 with 256 channels. With fewer lanes it
// would with more, but the rounding errors of a sum grow with its length.
constexpr int64_t kDepth = kLanes == 16 ? 128 : 256;

// panel (channels, stride) = the transpose of row(0) ... row(rows - 1), which are pointers to `channels` floats.
template <class Row>
SWINKERNELS_INLINE void pack(Row row, int64_t rows, int64_t channels, float* panel, int64_t stride) {
  const int64_t width = round_up(rows, kLanes), whole = channels / kLanes * kLanes;
  for (int64_t v = 0; v < width; v += kLanes) {
    const float* from[kLanes];  // the last row takes the place of rows that do not exist
    for (int64_t r = 0; r < kLanes; ++r) from[r] = row(smaller(v + r, rows - 1));
    for (int64_t c = 0; c < whole; c += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = load(from[r] + c);
      exchange_rows<1>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(panel + (c + r) * stride + v, block[r]);
    }
    for (int64_t c = whole; c < channels; ++c) {
      for (int64_t r = 0; r < kLanes; ++r) panel[c * stride + v + r] = from[r][c];
    }
  }
}

// Sets `mean` to the mean of x - centre and `square` to that of its square, over the channels of a vector of rows.
SWINKERNELS_INLINE void moments(Vec centre, const float* panel, int64_t channels, int64_t stride, Vec& mean,
                                Vec& square) {
  constexpr int kSums = 4;  // independent sums, which hide the latency of an addition
  Vec sums[kSums] = {}, squares[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= channels; c += kSums) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const Vec x = load(panel + (c + i) * stride) - centre;
      sums[i] += x;
      squares[i] += x * x;
    }
  }
  for (; c < channels; ++c) {
    const Vec x = load(panel + c * stride) - centre;
    sums[0] += x;
    squares[0] += x * x;
  }
  mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(channels);
  square = ((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(channels);
}

// Replaces each row of a panel (channels, stride) by its layer norm, for `width` rows. No sum goes across a vector, and
// all rows are treated alike, so a row's result does not depend on its place. The second pass over the channels corrects
// the rounding of the mean, and finds the variance from differences that do not cancel.
void normalise(const RowNorm& norm, int64_t channels, int64_t width, float* panel, int64_t stride) {
  for (int64_t v = 0; v < width; v += kLanes) {
    Vec about, rest, square;
    moments(Vec{}, panel + v, channels, stride, about, square);
    moments(about, panel + v, channels, stride, rest, square);
    const Vec mean = about + rest, rstd = 1.0f / sqrt(square - rest * rest + norm.eps);
    for (int64_t c = 0; c < channels; ++c) {
      float* at = panel + c * stride + v;
      Vec x = (load(at) - mean) * rstd;
      if (norm.weight != nullptr) x *= norm.weight[c];
      store(at, norm.bias == nullptr ? x : x + norm.bias[c]);
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

// Returns x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) as x / (1 + exp(-2 sqrt(2 / pi) (...))).
SWINKERNELS_INLINE Vec gelu_tanh(Vec x) {
  const Vec low = x < splat(-16.0f) ? splat(-16.0f) : x;  // where the result is -3e-34; NaN stays NaN
  const Vec exponent = low * (low * low * -0.0713548162f + -1.59576912f);
  return low / (exp(exponent < splat(80.0f) ? exponent : splat(80.0f)) + 1.0f);
}

SWINKERNELS_INLINE Vec activate(Vec x, Activation activation) {
  if (activation == Activation::kGelu) return gelu(x);
  return activation == Activation::kGeluTanh ? gelu_tanh(x) : x;
}

// Returns the part of the weight that follows, in a product, the slice of kColumns rows from `row` on and of kDepth
// channels from `channel` on.
const float* next_slice(const LinearLayer& layer, int64_t row, int64_t channel) {
  const bool same_rows = channel + kDepth < layer.in_features, last = row + kColumns >= layer.out_features;
  const int64_t next_row = same_rows || last ? row : row + kColumns;
  return layer.weight + next_row * layer.row_stride + (same_rows ? channel + kDepth : 0);
}

// y (count, stride) = rows [first, first + count) of the layer's weight times the panel x (in_features, stride), for
// `width` columns.
void multiply_columns(const LinearLayer& layer, int64_t first, int64_t count, const float* x, float* y, int64_t width,
                      int64_t stride) {
  for (int64_t c = 0; c < count; c += kColumns) {
    int64_t d = 0;
    do {  // once if there are no input channels
      float* sums = y + c * stride;
      matmul_fetching(smaller(kColumns, count - c), width, smaller(kDepth, layer.in_features - d),
                      layer.weight + (first + c) * layer.row_stride + d, layer.row_stride, x + d * stride, stride,
                      d > 0 ? sums : nullptr, sums, stride, next_slice(layer, first + c, d));
      d += kDepth;
    } while (d < layer.in_features);
  }
}

SWINKERNELS_INLINE Vec bias_of(const LinearLayer& layer, int64_t channel) {
  return splat(layer.bias == nullptr ? 0.0f : layer.bias[channel]);
}

// Where a row of a result goes, and the row that is added to it, or null. Nothing is written if `out` is null.
struct Place {
  float* out;
  const float* residual;
};

// Writes activation(y + bias) for the panel y (count, stride), whose channels are the layer's channels from `first` on,
// to place(0) ... place(rows - 1), which begin at the channel `first`. y has room for `count` rounded up to whole
// vectors.
template <Activation kActivation, class PlaceOf>
SWINKERNELS_INLINE void unpack(const LinearLayer& layer, int64_t first, int64_t count, const float* y, int64_t stride,
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
          const float* residual = places[r].residual;
          store(places[r].out + c, residual == nullptr ? block[r] : load(residual + c) + block[r]);
        }
        continue;
      }
      float part[kLanes][kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(part[r], block[r]);
      for (int64_t r = 0; r < last; ++r) {
        const auto [out, residual] = places[r];
        for (int64_t i = 0; out != nullptr && i < channels; ++i) {
          out[c + i] = residual == nullptr ? part[r][i] : residual[c + i] + part[r][i];
        }
      }
    }
  }
}

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
