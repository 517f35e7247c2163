// Layer norm backward: of plain rows, of merged neighbours, of expanded parts, or combined with a residual connection.
//
// Maths     v are the rows that are normalised, n = (v - mean) * rstd, g = dz * weight:
//           dv = rstd * (g - mean(g) - n * mean(g * n)), dweight = sum of dz * n, dbias = sum of dz over the rows.
//           Residual: dx = ds + dv, dy = scale * dx. Post norm: dz = scale * ds, dy = dv; dx = ds.
//           Merging writes dv to the position of v, and zeros to neighbours that are not part of any row.
// Tiling    as in fwd_sm80.cuh. A thread keeps its columns from row to row, so their dweight and dbias accumulate in
//           registers; at the end the block's threads that share a column add their sums in order, and
//           reduce_partials.cu adds the blocks' sums. If there are enough registers, the next row is loaded before this
//           one is reduced. Otherwise each warp has only one row in flight, but 12 warps suffice: about 5 saturate the
//           memory (cycles per warp and row: traffic 460, latency 800, computation 1,300).
// Order     there are no atomics: results are bitwise reproducible on one device.
// Traffic   v, dz (and ds) are read once, dx (and dy) written once; mean and rstd, 8 bytes per row, are read once.
//           The partial sums take 8 * blocks * length bytes, which are written and read in L2.
// Roofline  memory bound, like the forward kernel:
//           merging, bf16         232 MB  69 us, 650 instructions 35 us, 164 registers, 12 warps, 37 KB in flight
//           residual, bf16        312 MB  93 us, 630 instructions 34 us, 160 registers, 12 warps, 55 KB in flight
//           residual, f32 + bf16  620 MB 185 us, 750 instructions 41 us, 168 registers, 12 warps, 92 KB in flight
//           plus about 3 us for the second kernel.
// Limits    see layer_norm_cuda.h.
#pragma once

#include <cstddef>
#include <type_traits>

#include "../../common/ptx.cuh"
#include "rows.cuh"

namespace swinkernels::cuda {

template <class Source>
struct BackwardArguments : RowArguments<Source> {
  const void* normalised;
  const void* dz;
  const void* ds;
  const float* mean;
  const float* rstd;
  void* dx;
  void* dy;         // or null
  float* partials;  // (blocks, 2, length): each block's dweight and dbias, or null if neither is needed
};

struct BackwardSmem {
  RowGroup::Smem group;
  alignas(16) float columns[1];  // the weight; after the last row, dweight and dbias

  static size_t bytes(size_t parameter_bytes, bool has_partials) {
    return offsetof(BackwardSmem, columns) + (has_partials ? 2 : 1) * parameter_bytes;
  }
};

// Sums dweight and dbias over all threads that share a column, in an order that depends only on the length of a row,
// and writes the sums to `partial`, (2, length). `sums` is shared memory for two values per column.
template <int kVec, int kVecs>
__device__ __forceinline__ void write_partial(float* partial, float* sums, const RowGroup& group,
                                              const Columns<kVec, kVecs>& columns, uint32_t length,
                                              float (&dweight)[kVecs][kVec], float (&dbias)[kVecs][kVec]) {
  const uint32_t lanes = group.lanes(), sharers = max(lanes, kWarp);
  for (uint32_t distance = lanes; distance < kWarp; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        dweight[i][e] += __shfl_xor_sync(0xffffffffu, dweight[i][e], distance);
        dbias[i][e] += __shfl_xor_sync(0xffffffffu, dbias[i][e], distance);
      }
    }
  }
  float* const dbias_sums = sums + kVecs * kVec * lanes;
  __syncthreads();  // all threads have read the weight for the last time
  for (uint32_t turn = 0; turn < blockDim.x / sharers; ++turn) {
    if (threadIdx.x / sharers == turn && threadIdx.x % sharers < lanes) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const uint32_t column = columns.column(i) + e;
          sums[column] = (turn == 0 ? 0.0f : sums[column]) + dweight[i][e];
          dbias_sums[column] = (turn == 0 ? 0.0f : dbias_sums[column]) + dbias[i][e];
        }
      }
    }
    __syncthreads();
  }
  for (uint32_t column = threadIdx.x; column < length; column += blockDim.x) {
    partial[column] = sums[column];
    partial[length + column] = dbias_sums[column];
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kBackwardBlocks)
    layer_norm_bwd_kernel(const BackwardArguments<typename Traits::Source> args) {
  constexpr LayerNormOp kOp = Traits::kOp;
  constexpr bool kResidual = kOp == LayerNormOp::kResidual, kPostNorm = kOp == LayerNormOp::kPostNorm;
  constexpr int kVec = Traits::kVec, kVecs = Traits::kVecs;
  using In = typename Traits::In;
  using Out = typename Traits::Out;
  using X = std::conditional_t<kPostNorm, Out, In>;   // the normalised rows, and their gradient
  using Dz = std::conditional_t<kPostNorm, In, Out>;  // the gradient of the norm's result
  const DType x_dtype = kPostNorm ? args.out_dtype : args.in_dtype;
  const DType dz_dtype = kPostNorm ? args.in_dtype : args.out_dtype;

  BackwardSmem& smem = *reinterpret_cast<BackwardSmem*>(dynamic_smem());
  RowGroup group(args.lanes_log2, &smem.group);
  const Columns<kVec, kVecs> columns(group.lane(), group.lanes(), args.vectors);
  const auto slots = args.source.template slots<Traits::kBackwardKeepsSlots>(columns);
  const uint32_t block_vectors = kVecs * group.lanes();
  SharedParameter<kVec> weight(smem.columns, block_vectors);
  float dweight[kVecs][kVec] = {}, dbias[kVecs][kVec] = {};

  struct Row {
    uint32_t number;
    bool exists;
    typename Traits::Source::Position position;
  };
  const auto locate = [&](uint32_t number) {
    Row row = {number, number < args.rows, {}};
    if (row.exists) row.position = args.source.position(number);
    return row;
  };
  // These functions load unconverted vectors. Missing vectors are zeros, which do not change any sum.
  const auto load_x = [&](const Row& row, int i) {
    if (!row.exists || !columns.has(i) || !slots.exists(i, row.position)) return typename X::Raw{};
    return X::load(X::row(args.normalised, row.position.offset, x_dtype), slots.offset(i), x_dtype);
  };
  const auto load_dz = [&](const Row& row, int i) {
    if (!row.exists || !columns.has(i)) return typename Dz::Raw{};
    const void* dz = kPostNorm ? args.ds : args.dz;
    return Dz::load(Dz::row(dz, args.row_offset(row.number), dz_dtype), columns.column(i), dz_dtype);
  };
  const auto load_ds = [&](const Row& row, int i) {
    if (!row.exists || !columns.has(i)) return typename In::Raw{};
    return In::load(In::row(args.ds, args.row_offset(row.number), args.in_dtype), columns.column(i), args.in_dtype);
  };

  struct Inputs {
    Row row;
    typename X::Raw x[kVecs];
    typename Dz::Raw dz[kVecs];
    typename In::Raw ds[kVecs];
    float mean, rstd, scale;
  };
  const auto load = [&](uint32_t number) {
    Inputs inputs = {locate(number), {}, {}, {}, 0.0f, 0.0f, 0.0f};
    if (Traits::kKeepsRow) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        inputs.x[i] = load_x(inputs.row, i);
        inputs.dz[i] = load_dz(inputs.row, i);
        if (kResidual) inputs.ds[i] = load_ds(inputs.row, i);
      }
    }
    if (inputs.row.exists) {
      inputs.mean = args.mean[number];
      inputs.rstd = args.rstd[number];
      if (kOp != LayerNormOp::kNorm) inputs.scale = args.scale(number);
    }
    return inputs;
  };

  const uint32_t groups = blockDim.x >> args.lanes_log2, step = gridDim.x * groups;
  uint32_t first = blockIdx.x * groups;
  Inputs next = {};
  if (Traits::kBackwardPrefetch) next = load(first + group.index());
  weight.fill(args.weight, args.length);
  __syncthreads();

  for (; first < args.rows; first += step) {
    if (!Traits::kBackwardPrefetch) next = load(first + group.index());
    const Inputs inputs = next;
    if (Traits::kBackwardPrefetch) next = load(first + group.index() + step);  // in flight while this row is processed

    Row row = inputs.row;
    // Reads x - mean and the gradient of the norm's result.
    const auto read = [&](int i, float (&centred)[kVec], float (&dz)[kVec]) {
      X::unpack(Traits::kKeepsRow ? inputs.x[i] : load_x(row, i), centred, x_dtype);
      Dz::unpack(Traits::kKeepsRow ? inputs.dz[i] : load_dz(row, i), dz, dz_dtype);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        centred[e] -= inputs.mean;
        if (kPostNorm) dz[e] *= inputs.scale;
      }
    };

    float sums[2] = {0.0f, 0.0f};  // sums over the row of g = dz * weight and of g * (x - mean)
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      float centred[kVec], dz[kVec], w[kVec];
      read(i, centred, dz);
      weight.read(columns.vector(i), w);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float g = dz[e] * w[e];
        sums[0] += g;
        sums[1] = fmaf(g, centred[e], sums[1]);
      }
      if (args.partials == nullptr) continue;
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        dweight[i][e] = fmaf(dz[e], centred[e] * inputs.rstd, dweight[i][e]);
        dbias[i][e] += dz[e];
      }
    }
    group.sum(sums);
    if (!row.exists) continue;
    if (!Traits::kKeepsRow) row = locate(ptx::opaque(row.number));  // not kept in registers

    // dx = rstd * (g - mean(g) - (x - mean) * rstd^2 * mean(g * (x - mean))), stored in dz without the factor rstd.
    const float mean_g = sums[0] * args.inverse_length;
    const float slope = sums[1] * inputs.rstd * args.inverse_length * inputs.rstd;
    const auto differentiate = [&](const float (&centred)[kVec], const float (&w)[kVec], float (&dz)[kVec]) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) dz[e] = fmaf(dz[e], w[e], -fmaf(centred[e], slope, mean_g));
    };

    void* const dx = X::row(kPostNorm ? args.dy : args.dx, row.position.offset, x_dtype);
    void* const dy = Out::row(args.dy, args.row_offset(row.number), args.out_dtype);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (!columns.has(i)) continue;
      float centred[kVec], d[kVec], w[kVec], ds[kVec] = {};
      read(i, centred, d);
      weight.read(columns.vector(i), w);
      differentiate(centred, w, d);
      uint32_t offset = slots.offset(i);
      bool exists = slots.exists(i, row.position);
      if constexpr (Traits::kHandlesRepeats) {
        if (args.source.repeats != 0) {
          const MergedPiece piece = args.source.piece_of(columns.column(i));
          offset = args.source.offset_of(piece.destination, piece.within);
          exists = args.source.exists(piece.destination, row.position);
          for (uint32_t p = piece.next; p != MergedRows::kNone; p = args.source.next[p]) {
            const uint32_t column = p * args.source.piece.divisor + piece.within;
            float other[kVec];
            Dz::unpack(Dz::load(Dz::row(args.dz, args.row_offset(row.number), dz_dtype), column, dz_dtype), other,
                       dz_dtype);
            weight.read(column / kVec, w);
            differentiate(centred, w, other);
#pragma unroll
            for (int e = 0; e < kVec; ++e) d[e] += other[e];
          }
#pragma unroll
          for (int e = 0; e < kVec; ++e) d[e] = piece.repeats ? 0.0f : d[e];
        }
      }
      if (kResidual) In::unpack(Traits::kKeepsRow ? inputs.ds[i] : load_ds(row, i), ds, args.in_dtype);
#pragma unroll
      for (int e = 0; e < kVec; ++e) d[e] = fmaf(inputs.rstd, d[e], ds[e]);
      if (exists) X::store(dx, offset, X::pack(d, x_dtype), x_dtype);
      if (kResidual && args.dy != nullptr) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) d[e] *= inputs.scale;
        Out::store(dy, columns.column(i), Out::pack(d, args.out_dtype), args.out_dtype);
      }
    }
  }

  if (args.partials != nullptr) {
    write_partial(args.partials + static_cast<uint64_t>(blockIdx.x) * 2 * args.length, smem.columns, group, columns,
                  args.length, dweight, dbias);
  }
}

}  // namespace swinkernels::cuda
