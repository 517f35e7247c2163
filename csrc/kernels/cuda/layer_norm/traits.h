// The distribution of a row over threads. All constants that depend on the op, the element types and the row length are
// derived here.
//
// A row of V vectors belongs to `lanes` neighbouring threads, a power of two. A thread has kVecs of these vectors, with
// indices lane, lane + lanes, ..., and keeps its columns from row to row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../../params/layer_norm_cuda.h"
#include "../../common/vectors.cuh"
#include "row_source.cuh"

// Defaults that are still to be chosen by measurement on a GPU: the number of blocks of 128 threads per multiprocessor
// in the backward pass (BLOCKS), and loading the next row early (PREFETCH, 0 or 1). gpu/variants.py builds variants
// with other values of these macros, and the step "variants" times them.
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
constexpr uint32_t kBlock = 128;      // threads per block, unless a row needs more
constexpr uint32_t kMaxLanes = 1024;  // threads per row
constexpr uint32_t kMaxWarps = kMaxLanes / kWarp;

// The number of vectors per thread, and the maximum number of threads per row; together they determine the number of
// registers per thread.
struct VectorChoice {
  int vectors;
  uint32_t max_lanes;
};

// The models' rows have 96 * 2^n or 128 * 2^n elements. With 24 or 16 elements per thread, these rows leave no lane
// idle. Other rows are rounded up to the next of these lengths and leave at most a third of the lanes idle.
template <int kVec>
struct VectorChoices {
  static constexpr VectorChoice kList[2] = {{16 / kVec, 512}, {24 / kVec, 128}};
};
template <>
struct VectorChoices<1> {  // for rows that cannot be divided into vectors
  static constexpr VectorChoice kList[1] = {{8, 1024}};
};

struct RowPlan {
  int choice;
  uint32_t lanes;
};

// Returns the plan with the fewest slots (lanes times vectors per lane) that holds a row of `vectors` vectors. `lanes`
// is 0 if the row is too long.
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

// kOp_         the op, which determines the rows to normalise and the sum to compute
// Source_      the layout of rows in x (row_source.cuh)
// In_, Out_    element types in memory of in_dtype and out_dtype, or AnyElement
// kVec_        number of elements in a vector
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

  // Registers per thread in the backward pass, which needs more than the forward pass: 64 with 1,024 threads, 128 with
  // 512. Three blocks of 128 threads, or 12 warps per multiprocessor, leave 168 per thread.
  static constexpr int kBackwardBlocks = kMaxThreads == kBlock ? SWINKERNELS_NORM_BACKWARD_BLOCKS : 1;
  static constexpr int kRegisters =
      std::min(255, 64 * 1024 / (kBackwardBlocks * static_cast<int>(kMaxThreads)) / 8 * 8);
  // If the element type is not known at compile time, a row is not kept in registers but loaded again.
  static constexpr bool kKeepsRow = !std::is_same_v<In_, AnyElement>;
  // With 1,024 threads, a thread's 64 registers suffice for the sums of dweight and dbias, but not for the slots as
  // well.
  static constexpr bool kBackwardKeepsSlots = kMaxThreads < 1024;
  // True if the kernel supports merged rows in which several pieces are copies of the same neighbour, as in MONAI up to
  // 1.4.
  static constexpr bool kHandlesRepeats = std::is_same_v<Source, MergedRows> && !kKeepsRow;
  // If kKeepsRow, the next row is loaded before this one is processed: always in the forward pass, and in the backward
  // pass if there are enough registers for both rows, the sums of dweight and dbias, and 60 other values.
  static constexpr int kRowRegisters =
      kVecs * (In::kWords + Out::kWords + (kOp == LayerNormOp::kResidual ? In::kWords : 0));
  static constexpr bool kForwardPrefetch = SWINKERNELS_NORM_FORWARD_PREFETCH && kKeepsRow;
  static constexpr bool kBackwardPrefetch =
      SWINKERNELS_NORM_BACKWARD_PREFETCH && kKeepsRow && 2 * kVecs * kVec + 2 * kRowRegisters + 60 <= kRegisters;
};

}  // namespace swinkernels::cuda
