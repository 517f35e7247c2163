// The table of v2's continuous position bias, for one instruction set and format; see simd.inl and panels.inl for how this
// is compiled.
//
// Maths     table = 16 sigmoid(fc2(relu(fc1(offsets))))
// Layout    A task is one panel of offsets (see panels.inl). Its hidden layer, as units, is the panel that fc2 reads. The
//           table is float32 in either format.
// Work      A table of (2 * 8 - 1)^2 rows with 512 hidden channels and 12 heads takes 1.6 M multiplications and additions.
//           Computing them takes less time than calling the five torch functions that compute the table otherwise.
#pragma once
#include "panels.inl"

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

constexpr int64_t kOffsetRows = kTileVectors * kLanes;

struct PositionBias {
  float *offsets, *hidden, *scores;  // panels, kOffsetRows wide
  float* slice;                      // of a weight

  PositionBias(const PositionBiasParams<Element>& p, Arena& arena) {
    offsets = arena.take<float>(p.fc1.in_features / kNumbers * kOffsetRows);
    hidden = arena.take<float>(p.fc1.out_features * kOffsetRows);
    scores = arena.take<float>(p.fc2.out_features * kOffsetRows);
    slice = arena.take<float>(kSliceFloats);
  }
};

int64_t position_bias_tasks(const PositionBiasParams<Element>& p) { return (p.rows + kOffsetRows - 1) / kOffsetRows; }

int64_t position_bias_scratch_bytes(const PositionBiasParams<Element>& p) {
  Arena arena(nullptr);
  PositionBias(p, arena);
  return arena.bytes();
}

void position_bias(const PositionBiasParams<Element>& p, int64_t* next, void* memory) {
  [[maybe_unused]] const TileRegisters tiles;
  Arena arena(memory);
  const PositionBias s(p, arena);
  const int64_t axes = p.fc1.in_features, hidden = p.fc1.out_features, heads = p.fc2.out_features;
  for (;;) {
    const int64_t first = kOffsetRows * __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
    if (first >= p.rows) return;
    const int64_t rows = smaller(kOffsetRows, p.rows - first), width = round_up(rows, kLanes);
    pack([&](int64_t r) { return p.offsets + (first + r) * axes; }, rows, axes / kNumbers, s.offsets, width);
    multiply_columns(p.fc1, 0, hidden, s.offsets, s.hidden, width, width, s.slice);
    for (int64_t c = 0; c < hidden; c += kNumbers) {
      Vec bias[kNumbers];
      for (int n = 0; n < kNumbers; ++n) bias[n] = bias_of(p.fc1, c + n);
      for (int64_t v = 0; v < width; v += kLanes) {
        Vec x[kNumbers];
        for (int n = 0; n < kNumbers; ++n) {
          x[n] = load(s.hidden + (c + n) * width + v) + bias[n];
          x[n] = x[n] < Vec{} ? Vec{} : x[n];  // NaN stays NaN
        }
        store(s.hidden + c / kNumbers * width + v, Stored::join(x));
      }
    }
    multiply_columns(p.fc2, 0, heads, s.hidden, s.scores, width, width, s.slice);
    for (int64_t c = 0; c < heads; ++c) {
      for (int64_t v = 0; v < width; v += kLanes) {
        const Vec exponent = -load(s.scores + c * width + v);
        float bias[kLanes];
        store(bias, 16.0f / (1.0f + exp(exponent > splat(80.0f) ? splat(80.0f) : exponent)));  // NaN stays NaN
        for (int64_t r = 0; r < smaller(kLanes, rows - v); ++r) p.table[(first + v + r) * heads + c] = bias[r];
      }
    }
  }
}

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
