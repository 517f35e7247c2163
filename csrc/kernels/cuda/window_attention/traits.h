// Tile sizes of the window attention kernels. All constants that depend on the product policy, the head_dim and the
// window are derived here.
#pragma once

#include "../../../params/window_attention_cuda.h"
#include "../../common/ptx.cuh"
#include "half_range.cuh"

// Defaults that are still to be chosen by measurement on a GPU, for short windows with narrow rows (16 bits, head_dim
// up to 32): copies in flight (STAGES), and warps per multiprocessor (WARPS). gpu/variants.py builds variants with
// other values of these macros, and the step "variants" times them.
#ifndef SWINKERNELS_FORWARD_STAGES
#define SWINKERNELS_FORWARD_STAGES 2
#endif
#ifndef SWINKERNELS_FORWARD_WARPS
#define SWINKERNELS_FORWARD_WARPS 16
#endif
#ifndef SWINKERNELS_BACKWARD_STAGES
#define SWINKERNELS_BACKWARD_STAGES 2
#endif
#ifndef SWINKERNELS_BACKWARD_WARPS
#define SWINKERNELS_BACKWARD_WARPS 12
#endif

namespace swinkernels::cuda {

// Product_   the product policy (tile_product.cuh); its T is the element type in memory
// kHeadDim_  number of columns of the tiles; rows of a smaller head_dim are padded with zeros
// kTiles_    a block of keys has 8 * kTiles_ keys; it is the whole window, or one step of a loop for larger windows
template <class Product_, int kHeadDim_, int kTiles_>
struct WindowAttentionTraits {
  using Product = Product_;
  using T = typename Product::T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTiles = kTiles_;
  static constexpr int kKeys = 8 * kTiles;
  static constexpr int kWarps = (kTiles + 1) / 2;  // a warp has 16 query rows
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlock = 16 * kWarps;  // rows of a tile
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kHeadDimTiles = kHeadDim / 8;
  static_assert(kBlock * kRowBytes <= 16 * 1024, "a block of 64 rows is for rows of at most 256 bytes");

  // Copies in flight. With two stages, the next window is copied while this one is processed. There is only one stage
  // if the shared memory of two would leave too few warps per multiprocessor to hide latency.
  static constexpr int kForwardStages = kBlock * kRowBytes <= 4 * 1024 ? SWINKERNELS_FORWARD_STAGES : 1;
  static constexpr int kBackwardStages = kBlock * kRowBytes <= 4 * 1024 ? SWINKERNELS_BACKWARD_STAGES : 1;
  // Blocks per multiprocessor, derived from the largest number of warps for which no registers are spilled. With 16
  // warps a thread can use 128 registers, with 12 it can use 168, and with 8 the maximum of 255.
  static constexpr bool kNarrow = sizeof(T) == 2 && kHeadDim <= 32 && kTiles < 8;
  static constexpr int kForwardBlocks = (kNarrow ? SWINKERNELS_FORWARD_WARPS : kRowBytes < 512 ? 12 : 8) / kWarps;
  static constexpr int kBackwardBlocks = (kNarrow ? SWINKERNELS_BACKWARD_WARPS : 8) / kWarps;
  static constexpr int kLongBlocks = 8 / kWarps;

  // The maximum number of entries of a bias table's column that the general kernels for long windows copy to shared
  // memory; 47 x 47 and 13 x 13 x 13 fit. The widest rows leave no space for a column on devices with 99 KB of it.
  static constexpr int kSharedTableEntries = kRowBytes < 512 ? 2304 : 0;
};

// Returns the number of columns of the tiles for rows of head_dim elements.
constexpr int tile_columns(int head_dim) { return head_dim <= 16 ? 16 : head_dim <= 32 ? 32 : 64; }

// Traits of the kernels for short windows of 16-bit elements, for which head_dim is known at compile time.
template <class Product_, int kExactHeadDim_, int kTiles_>
struct Short16Traits : WindowAttentionTraits<Product_, tile_columns(kExactHeadDim_), kTiles_> {
  using Base = WindowAttentionTraits<Product_, tile_columns(kExactHeadDim_), kTiles_>;
  static constexpr int kExactHeadDim = kExactHeadDim_;
  static constexpr int kRowBytes = kExactHeadDim * 2;  // in memory
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kRowTiles = kExactHeadDim / 8;
  static constexpr int kChunks = Base::kHeadDim / 8;  // 16-byte chunks of a tile's row
  static_assert(sizeof(typename Base::T) == 2 && kRowBytes % 16 == 0 && Base::kKeys <= 64);
  static_assert(Base::kForwardStages <= 2 && Base::kBackwardStages <= 2, "their rings have one or two stages");
  // With up to seven tiles, a multiprocessor has as many warps as in the base class; with eight, as many as with seven.
  // It has fewer where registers would be spilled: in the forward pass with eight tiles without stmatrix, and on
  // Blackwell except in the cases below. Without stmatrix, there is shared memory for only two blocks of the backward
  // pass.
  static constexpr bool kNarrow = Base::kHeadDim <= 32;
  static constexpr bool kSeven = kRowTiles == 4 && kTiles_ < 8;      // head_dim 32
  static constexpr bool kWide = !kHasNarrowRange<typename Base::T>;  // needs no maximum and no exponents
  static constexpr bool kFitsForward = ptx::kIsBlackwell ? kWide || kSeven : ptx::kHasStmatrix || kTiles_ < 8;
  static constexpr bool kFitsBackward = ptx::kIsBlackwell ? kWide && kSeven : ptx::kHasStmatrix;
  static constexpr bool kSpareForward = kNarrow && (kFitsForward || kTiles_ < 7);
  static constexpr bool kSpareBackward = kNarrow && (kFitsBackward || kTiles_ < 7);
  static constexpr int kForwardBlocks = (kSpareForward ? SWINKERNELS_FORWARD_WARPS : 12) / Base::kWarps;
  static constexpr int kBackwardBlocks = (kSpareBackward ? SWINKERNELS_BACKWARD_WARPS : 8) / Base::kWarps;
};

}  // namespace swinkernels::cuda
