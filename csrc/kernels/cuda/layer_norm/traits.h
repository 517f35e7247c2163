// The distribution of a row over threads. Every number that follows from op, element types and row is derived here,
// once.
//
// A row of V vectors belongs to `lanes` neighbouring threads, a power of two. A thread has kVecs of these vectors,
// numbered lane, lane + lanes, ..., and keeps its columns from row to row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../../params/layer_norm_cuda.h"
#include "../../common/vectors.cuh"
#include "row_source.cuh"

// To be settled by measurement: the number of blocks of 128 threads per multiprocessor in the backward pass, and
// whether to load the next row early. gpu/variants.py builds and times variants that define these macros.
#ifndef SWINKERNELS_NORM_BACKWARD_BLOCKS
#define SWINKERNELS_NORM_BACKWARD_BLOCKS 3
#endif
#ifndef SWINKERNELS_NORM_FORWARD_PREFETCH
#define SWINKERNELS_NORM_FORWARD_PREFETCH 1
#endif
#ifndef SWINKERNELS_NORM_BACKWARD_PREFETCH
#define SWINKERNELS_NORM_BACKWARD_PREFETCH 1
#endif

namespace swinkernels::cuda {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kBlock = 128;      // threads, unless a row needs more
constexpr uint32_t kMaxLanes = 1024;  // threads of a row
constexpr uint32_t kMaxWarps = kMaxLanes / kWarp;

// A number of vectors per thread, and the most threads that may share such a row; both determine a thread's registers.
struct VectorChoice {
  int vectors;
  uint32_t max_lanes;
};

// The models' rows have 96 * 2^n or 128 * 2^n elements. With 24 or 16 elements per thread no lane is idle for either;
// other rows, rounded up to the next of these, leave at most a third idle.
template <int kVec>
struct VectorChoices {
  static constexpr VectorChoice kList[2] = {{16 / kVec, 512}, {24 / kVec, 128}};
};
template <>
struct VectorChoices<1> {  // rows that are not made of vectors
  static constexpr VectorChoice kList[1] = {{8, 1024}};
};

struct RowPlan {
  int choice;
  uint32_t lanes;
};

// Returns the plan with the fewest slots that hold a row of this many vectors; it has no lanes if the row is too long.
template <int kVec>
constexpr RowPlan plan_row(uint32_t vectors) {
  for (uint32_t lanes = 1; lanes <= kMaxLanes; lanes *= 2) {
    int i = 0;
    for (const VectorChoice& choice : VectorChoices<kVec>::kList) {
      if (lanes <= choice.max_lanes && vectors <= choice.vectors * lanes) return {i, lanes};
      ++i;
    }
  }
  return {0, 0};
}
static_assert(plan_row<8>(96 / 8).lanes == 4 && plan_row<8>(96 / 8).choice == 1);
static_assert(plan_row<8>(128 / 8).lanes == 8 && plan_row<8>(128 / 8).choice == 0);
static_assert(plan_row<8>(kMaxRow / 8).lanes > 0 && plan_row<4>(kMaxRow / 4).lanes > 0 &&
              plan_row<1>(kMaxRow).lanes > 0);

// kOp_         the rows to normalise and the sum to add
// Source_      the layout of rows in x (row_source.cuh)
// In_, Out_    element types in memory of in_dtype and out_dtype, or AnyElement
// kVec_        elements of a vector
// kChoice      index into VectorChoices
template <LayerNormOp kOp_, class Source_, class In_, class Out_, int kVec_, int kChoice>
struct LayerNormTraits {
  static constexpr LayerNormOp kOp = kOp_;
  using Source = Source_;
  static_assert(kOp == LayerNormOp::kNorm || std::is_same_v<Source, PlainRows>, "rows of residual ops are plain");
  using In = Vectors<In_, kVec_>;
  using Out = Vectors<Out_, kVec_>;
  static constexpr int kVec = kVec_;
  static constexpr VectorChoice kChosen = VectorChoices<kVec>::kList[kChoice];
  static constexpr int kVecs = kChosen.vectors;
  static constexpr uint32_t kMaxThreads = kChosen.max_lanes > kBlock ? kChosen.max_lanes : kBlock;

  // Registers per thread in the backward pass, which needs more than forward: 64 with 1,024 threads, 128 with 512.
  // Three blocks of 128 threads leave 168, so that a multiprocessor has 12 warps.
  static constexpr int kBackwardBlocks = kMaxThreads == kBlock ? SWINKERNELS_NORM_BACKWARD_BLOCKS : 1;
  static constexpr int kRegisters =
      std::min(255, 64 * 1024 / (kBackwardBlocks * static_cast<int>(kMaxThreads)) / 8 * 8);
  // Without a known element type a row is not kept but loaded again on its next use.
  static constexpr bool kKeepsRow = !std::is_same_v<In_, AnyElement>;
  // With 1,024 threads, a thread's 64 registers hold the sums of dweight and dbias, but not the row's slots as well.
  static constexpr bool kBackwardKeepsSlots = kMaxThreads < 1024;
  // These kernels also support neighbours with several pieces or none, as in an order that MONAI used until 1.4.
  static constexpr bool kHandlesRepeats = std::is_same_v<Source, MergedRows> && !kKeepsRow;
  // The next row is loaded before this one is computed: forward always, backward if registers hold both in addition to
  // the sums of dweight and dbias, and leave 60 for the rest.
  static constexpr int kRowRegisters =
      kVecs * (In::kWords + Out::kWords + (kOp == LayerNormOp::kResidual ? In::kWords : 0));
  static constexpr bool kForwardPrefetch = SWINKERNELS_NORM_FORWARD_PREFETCH && kKeepsRow;
  static constexpr bool kBackwardPrefetch =
      SWINKERNELS_NORM_BACKWARD_PREFETCH && kKeepsRow && 2 * kVecs * kVec + 2 * kRowRegisters + 60 <= kRegisters;
};

}  // namespace swinkernels::cuda
