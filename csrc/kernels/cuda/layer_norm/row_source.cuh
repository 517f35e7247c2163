// Computes the positions of a row's vectors in x. Implements the definition of LayerNormRows (csrc/params/layer_norm.h)
// as index arithmetic without divisions, with one struct per layout. Values that depend only on a thread's columns are
// computed once per thread, and values that depend on the row once per row.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../../params/layer_norm.h"
#include "../../common/fast_divisor.cuh"
#include "../../common/ptx.cuh"

namespace swinkernels::cuda {

// The columns of a thread's vectors in z. They are also the columns in x if the row is contiguous in x.
template <int kVec, int kVecs>
struct Columns {
  uint32_t lane, lanes;
  uint32_t held;  // bit i: vector i is part of the row

  __device__ __forceinline__ Columns(uint32_t lane_, uint32_t lanes_, uint32_t vectors)
      : lane(lane_), lanes(lanes_), held(0) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) held |= (vector(i) < vectors ? 1u : 0u) << i;
  }
  __device__ __forceinline__ uint32_t vector(int i) const { return lane + i * lanes; }
  __device__ __forceinline__ uint32_t column(int i) const { return vector(i) * kVec; }
  __device__ __forceinline__ bool has(int i) const { return held >> i & 1; }
};

// A row that is also contiguous in x.
struct ContiguousRow {
  uint64_t offset;  // from x to the row, in elements

  template <int kVec, int kVecs>
  struct Slots {
    Columns<kVec, kVecs> columns;
    __device__ __forceinline__ uint32_t offset(int i) const { return columns.column(i); }
    __device__ __forceinline__ bool exists(int, const ContiguousRow&) const { return true; }
  };
};

struct PlainRows {
  uint32_t length;

  using Position = ContiguousRow;
  template <int kVec, int kVecs>
  using Slots = ContiguousRow::Slots<kVec, kVecs>;

  static bool of(const LayerNormRows& rows, PlainRows* source) {
    source->length = static_cast<uint32_t>(rows.length);
    return true;
  }
  __device__ __forceinline__ Position position(uint32_t row) const { return {static_cast<uint64_t>(row) * length}; }
  template <bool, int kVec, int kVecs>
  __device__ __forceinline__ Slots<kVec, kVecs> slots(const Columns<kVec, kVecs>& columns) const {
    return {columns};
  }
};

// Base of MergedRows and ExpandedRows, in which z is a map. Rows are numbered row-major over the tokens of all images.
struct MapRows {
  RowMajorDivisor tokens;   // tokens of an image of z
  uint64_t batch_stride;    // from one image of x to the next, in elements
  uint32_t axis_stride[3];  // in elements of x

  // Returns false if the number of tokens or a stride is too large, or if the rows do not form whole images.
  bool fill(const LayerNormRows& rows, const int64_t (&z_tokens)[3], int64_t channels, const int64_t (&step)[3]) {
    int64_t count = 1, stride = channels;
    int32_t extent[3];
    for (int axis = 2; axis >= 0; --axis) {
      count *= z_tokens[axis];
      if (z_tokens[axis] > INT32_MAX || count > INT32_MAX) return false;
      extent[axis] = static_cast<int32_t>(z_tokens[axis]);
      axis_stride[axis] = 0;
      if (rows.size[axis] > 1) {  // the stride of an axis with one token is never used
        if (stride * step[axis] > UINT32_MAX) return false;
        axis_stride[axis] = static_cast<uint32_t>(stride * step[axis]);
      }
      stride *= rows.size[axis];
    }
    tokens = RowMajorDivisor::of(extent);
    batch_stride = static_cast<uint64_t>(stride);
    return rows.count % count == 0;
  }
};

// Eight 4-bit numbers in one register, from which a lane can select one without a table in memory.
struct Nibbles {
  uint32_t bits;

  void set(int i, uint32_t value) { bits = (bits & ~(15u << 4 * i)) | value << 4 * i; }
  __device__ __forceinline__ uint32_t operator[](uint32_t i) const { return bits >> 4 * i & 15; }
};

// The piece of a merged row that contains a given column. Several pieces may be copies of the same neighbour.
struct MergedPiece {
  uint32_t within;       // position of the column in the piece
  bool repeats;          // an earlier piece has the same neighbour and writes its dx
  uint32_t next;         // the next piece with the same neighbour; kNone if there is none, or if `repeats` is true
  uint32_t destination;  // the neighbour to write dx to or, if `repeats` is true, one without a piece, to set to zero
};

// A merged row consists of pieces, each a token of a block of x, such as 2 x 2 neighbours. Bit a of a neighbour's index
// is its offset in the block on axis a.
struct MergedRows : MapRows {
  static constexpr uint32_t kNone = 15;

  FastDivisor piece;    // elements of a piece
  uint32_t second[3];   // from a token to the next one on an axis, in elements
  uint32_t cut_off[3];  // coordinate in z of the blocks that cross the map's end, or UINT32_MAX if there are none
  Nibbles neighbour;    // the neighbour of each piece
  // See MergedPiece. The number of neighbours without a piece equals the number of pieces that repeat a neighbour.
  uint32_t repeats;  // bit p: piece p repeats a neighbour
  Nibbles next, destination;

  struct Position {
    uint64_t offset;   // from x to the block's first token, in elements
    uint32_t outside;  // bit a: the second neighbours on axis a are outside the map
  };

  __device__ __forceinline__ Position position(uint32_t row) const {
    uint32_t at[3];
    Position p = {tokens.divide(row, at) * batch_stride, 0};
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      p.offset += static_cast<uint64_t>(at[axis]) * axis_stride[axis];
      p.outside |= (at[axis] == cut_off[axis] ? 1u : 0u) << axis;
    }
    return p;
  }

  __device__ __forceinline__ bool exists(uint32_t which, const Position& position) const {
    return (which & position.outside) == 0;
  }
  __device__ __forceinline__ MergedPiece piece_of(uint32_t column) const {
    MergedPiece result;
    const uint32_t p = piece.divide(column, &result.within);
    result.repeats = repeats >> p & 1;
    result.next = result.repeats ? kNone : next[p];
    result.destination = destination[p];
    return result;
  }

  // Returns the offset, in elements, of column `within` of neighbour `which` from the block's first token.
  __device__ __forceinline__ uint32_t offset_of(uint32_t which, uint32_t within) const {
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) within += which >> axis & 1 ? second[axis] : 0;
    return within;
  }

  template <int kVec, int kVecs>
  class Slots {
   public:
    __device__ __forceinline__ Slots(const MergedRows& source, const Columns<kVec, kVecs>& columns) : neighbours_(0) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        offset_[i] = 0;
        if (!columns.has(i)) continue;
        uint32_t within;
        const uint32_t which = source.neighbour[source.piece.divide(columns.column(i), &within)];
        offset_[i] = source.offset_of(which, within);
        neighbours_ |= static_cast<Bits>(which) << 3 * i;
      }
    }
    __device__ __forceinline__ uint32_t offset(int i) const { return offset_[i]; }
    __device__ __forceinline__ bool exists(int i, const Position& position) const {
      return (static_cast<uint32_t>(neighbours_ >> 3 * i) & position.outside) == 0;
    }

   private:
    using Bits = std::conditional_t<3 * kVecs <= 32, uint32_t, uint64_t>;
    uint32_t offset_[kVecs];
    Bits neighbours_;
  };

  // Computes the offsets at each use, for kernels that do not have enough registers to keep them.
  template <int kVec, int kVecs>
  class ComputedSlots {
   public:
    __device__ __forceinline__ ComputedSlots(const MergedRows& source, const Columns<kVec, kVecs>& columns)
        : source_(source), columns_(columns) {}
    __device__ __forceinline__ uint32_t offset(int i) const {
      uint32_t within;
      const uint32_t which = locate(i, &within);
      return source_.offset_of(which, within);
    }
    __device__ __forceinline__ bool exists(int i, const Position& position) const {
      uint32_t within;
      return source_.exists(locate(i, &within), position);
    }

   private:
    const MergedRows& source_;
    const Columns<kVec, kVecs>& columns_;

    __device__ __forceinline__ uint32_t locate(int i, uint32_t* within) const {
      const uint32_t vector = ptx::opaque(columns_.lane) + i * columns_.lanes;
      return source_.neighbour[source_.piece.divide(vector * kVec, within)];
    }
  };

  template <bool kKept, int kVec, int kVecs>
  __device__ __forceinline__ auto slots(const Columns<kVec, kVecs>& columns) const {
    return std::conditional_t<kKept, Slots<kVec, kVecs>, ComputedSlots<kVec, kVecs>>(*this, columns);
  }

  static bool of(const LayerNormRows& rows, MergedRows* source);
  // Returns true if several pieces are copies of the same neighbour. Returns false for rows that `of` rejects.
  static bool has_repeats(const LayerNormRows& rows) {
    MergedRows source;
    return rows.layout == RowLayout::kMerging && of(rows, &source) && source.repeats != 0;
  }
};

// A row is a part of a token of x.
struct ExpandedRows : MapRows {
  FastDivisor factor[3];
  uint32_t part_stride[3];  // elements

  using Position = ContiguousRow;
  template <int kVec, int kVecs>
  using Slots = ContiguousRow::Slots<kVec, kVecs>;

  __device__ __forceinline__ Position position(uint32_t row) const {
    uint32_t at[3];
    Position p = {tokens.divide(row, at) * batch_stride};
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      uint32_t part;
      const uint32_t token = factor[axis].divide(at[axis], &part);
      p.offset += static_cast<uint64_t>(token) * axis_stride[axis];
      p.offset += static_cast<uint64_t>(part) * part_stride[axis];
    }
    return p;
  }
  template <bool, int kVec, int kVecs>
  __device__ __forceinline__ Slots<kVec, kVecs> slots(const Columns<kVec, kVecs>& columns) const {
    return {columns};
  }

  static bool of(const LayerNormRows& rows, ExpandedRows* source) {
    int64_t tokens[3], parts = 1;
    for (int axis = 2; axis >= 0; --axis) {
      if (rows.size[axis] < 1 || rows.factor[axis] < 1) return false;
      if (parts * rows.length > UINT32_MAX) return false;
      source->factor[axis] = FastDivisor::of(static_cast<uint32_t>(rows.factor[axis]));
      source->part_stride[axis] = static_cast<uint32_t>(parts * rows.length);
      tokens[axis] = int64_t{1} * rows.size[axis] * rows.factor[axis];
      parts *= rows.factor[axis];
    }
    return source->fill(rows, tokens, parts * rows.length, {1, 1, 1});
  }
};

inline bool MergedRows::of(const LayerNormRows& rows, MergedRows* source) {
  *source = {};
  int64_t tokens[3], step[3], parts = 1, farthest = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const int32_t size = rows.size[axis], factor = rows.factor[axis];
    if (size < 1 || factor < 1 || factor > 2) return false;
    parts *= factor;
    step[axis] = factor;
    tokens[axis] = (int64_t{size} + factor - 1) / factor;
    source->cut_off[axis] = factor == 2 && size % 2 == 1 ? static_cast<uint32_t>(tokens[axis] - 1) : UINT32_MAX;
  }
  const int64_t channels = rows.length / parts;
  if (rows.length % parts != 0 || !source->fill(rows, tokens, channels, step)) return false;
  source->piece = FastDivisor::of(static_cast<uint32_t>(channels));
  int64_t stride = channels;
  for (int axis = 2; axis >= 0; --axis) {
    if (rows.factor[axis] == 2 && rows.size[axis] > 1) {
      farthest += stride;
      source->second[axis] = static_cast<uint32_t>(stride);
    }
    stride *= rows.size[axis];
  }
  if (farthest + channels > INT32_MAX) return false;

  uint32_t with_piece = 0, existing = 0;
  const auto bits_of = [&rows](int32_t number) {
    const int32_t row = number / rows.factor[2];
    return static_cast<uint32_t>(row / rows.factor[1] | row % rows.factor[1] << 1 | number % rows.factor[2] << 2);
  };
  for (int p = 0; p < parts; ++p) {
    const int32_t number = rows.neighbours[p];
    if (number < 0 || number >= parts) return false;
    existing |= 1u << bits_of(p);
    with_piece |= 1u << bits_of(number);
    source->neighbour.set(p, bits_of(number));
    source->destination.set(p, bits_of(number));
    source->next.set(p, kNone);
    for (int earlier = p - 1; earlier >= 0; --earlier) {
      if (rows.neighbours[earlier] != number) continue;
      source->next.set(earlier, p);
      source->repeats |= 1u << p;
      break;
    }
  }
  uint32_t free = existing & ~with_piece;
  for (int p = 0; p < parts; ++p) {
    if (!(source->repeats >> p & 1)) continue;
    uint32_t which = 0;
    while (!(free >> which & 1)) ++which;
    free &= ~(1u << which);
    source->destination.set(p, which);
  }
  return true;
}

}  // namespace swinkernels::cuda
