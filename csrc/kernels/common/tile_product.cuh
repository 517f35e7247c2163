// Products of small tiles by one warp, accumulated in float fragments of 16 rows (PTX accumulator layout, see ptx.cuh):
//   add_abt   c += A B^T     16 rows of A and 8 * kTiles rows of B, both in shared memory
//   add_pb    o += P B       P an accumulator fragment of 16 x (8 * kTiles), B 8 * kTiles rows in shared memory
//   add_ptb   o += P^T B     P and B 8 * kTiles rows in shared memory, 16 columns of P
// The product policies use 16-bit tensor cores, TF32 tensor cores or float fused multiply-adds. All three produce the
// same layout, so each kernel is written once. The contracted index may be permuted if both operands use the same
// permutation. Tf32Product takes P directly from registers, so its index t is column 2t, and t + 4 is column 2t + 1.
#pragma once

#include "ptx.cuh"
#include "smem_tile.cuh"

namespace swinkernels {

// c += A B^T on tensor cores. Each step contracts two 16-byte chunks of the rows: 16 elements of 16 bits, or 8 floats.
template <class Policy, int kTiles, class Tile>
__device__ __forceinline__ void tensor_core_add_abt(float (&c)[kTiles][4], const Tile& a_tile, int a_row,
                                                    const Tile& b_tile) {
  if constexpr (Tile::kChunks == 2) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, a_tile.square(a_row, 0));
    Policy::round(a);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint32_t b[2];
      ptx::ldmatrix_x2(b, b_tile.band(8 * j, 0));
      Policy::round(b);
      Policy::multiply(c[j], a, b);
    }
  } else {
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 4) {
      uint32_t a[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        ptx::ldmatrix_x4(a[step], a_tile.square(a_row, chunk + 2 * step));
        Policy::round(a[step]);
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, b_tile.band(8 * j, chunk));
        Policy::round(b);
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        Policy::multiply(c[j], a[0], b0);
        Policy::multiply(c[j], a[1], b1);
      }
    }
  }
}

template <class T_>
struct HalfPrecisionProduct {
  using T = T_;
  static constexpr bool kIsExact = false;  // true if operands are not rounded

  template <int kCount>
  __device__ static __forceinline__ void round(uint32_t (&)[kCount]) {}
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16(d, a, b, T{});
  }

  template <int kTiles, class Tile>
  __device__ static __forceinline__ void add_abt(float (&c)[kTiles][4], const Tile& a, int a_row, const Tile& b) {
    tensor_core_add_abt<HalfPrecisionProduct>(c, a, a_row, b);
  }

  template <int kTiles, int kColTiles, class Tile>
  __device__ static __forceinline__ void add_pb(float (&o)[kColTiles][4], const float (&p)[kTiles][4], const Tile& b) {
#pragma unroll
    for (int step = 0; step < kTiles / 2; ++step) {
      const float (&left)[4] = p[2 * step], (&right)[4] = p[2 * step + 1];
      const uint32_t a[4] = {pack2<T>(left[0], left[1]), pack2<T>(left[2], left[3]), pack2<T>(right[0], right[1]),
                             pack2<T>(right[2], right[3])};
      add_step(o, a, b, 16 * step);
    }
    if constexpr (kTiles % 2 == 1) {
      const float (&last)[4] = p[kTiles - 1];
      const uint32_t a[2] = {pack2<T>(last[0], last[1]), pack2<T>(last[2], last[3])};
      add_half_step(o, a, b, 8 * (kTiles - 1));
    }
  }

  // Like add_pb, but P is packed by pairs (see write_packed in smem_tile.cuh).
  template <int kTiles, int kColTiles, class Tile>
  __device__ static __forceinline__ void add_pb(float (&o)[kColTiles][4], const uint32_t (&p)[kTiles][2],
                                                const Tile& b) {
#pragma unroll
    for (int step = 0; step < kTiles / 2; ++step) {
      add_step(o, {p[2 * step][0], p[2 * step][1], p[2 * step + 1][0], p[2 * step + 1][1]}, b, 16 * step);
    }
    if constexpr (kTiles % 2 == 1) add_half_step(o, {p[kTiles - 1][0], p[kTiles - 1][1]}, b, 8 * (kTiles - 1));
  }

  // Adds the row sums of a packed P, computed as a product with ones: sum[0] is for row g, sum[2] for row g + 8.
  template <int kTiles>
  __device__ static __forceinline__ void add_row_sums(float (&sum)[4], const uint32_t (&p)[kTiles][2]) {
    const uint32_t ones = pack2<T>(1.0f, 1.0f);
#pragma unroll
    for (int step = 0; step < kTiles / 2; ++step) {
      ptx::mma_m16n8k16(sum, {p[2 * step][0], p[2 * step][1], p[2 * step + 1][0], p[2 * step + 1][1]}, {ones, ones},
                        T{});
    }
    if constexpr (kTiles % 2 == 1) ptx::mma_m16n8k8(sum, {p[kTiles - 1][0], p[kTiles - 1][1]}, {ones}, T{});
  }

  template <int kTiles, int kColTiles, class PTile, class Tile>
  __device__ static __forceinline__ void add_ptb(float (&o)[kColTiles][4], const PTile& p, int p_col, const Tile& b) {
#pragma unroll
    for (int step = 0; step < kTiles / 2; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4_trans(a, p.transposed_square(16 * step, p_col / 8));
      add_step(o, a, b, 16 * step);
    }
    if constexpr (kTiles % 2 == 1) {
      uint32_t a[2];
      ptx::ldmatrix_x2_trans(a, p.transposed_square(8 * (kTiles - 1), p_col / 8));
      add_half_step(o, a, b, 8 * (kTiles - 1));
    }
  }

 private:
  // o += a B over 16 rows of B.
  template <int kColTiles, class Tile>
  __device__ static __forceinline__ void add_step(float (&o)[kColTiles][4], const uint32_t (&a)[4], const Tile& tile,
                                                  int row) {
    static_assert(kColTiles % 2 == 0);
#pragma unroll
    for (int n = 0; n < kColTiles; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, tile.square(row, n));
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      ptx::mma_m16n8k16(o[n], a, b0, T{});
      ptx::mma_m16n8k16(o[n + 1], a, b1, T{});
    }
  }

  // o += a B over 8 rows of B.
  template <int kColTiles, class Tile>
  __device__ static __forceinline__ void add_half_step(float (&o)[kColTiles][4], const uint32_t (&a)[2],
                                                       const Tile& tile, int row) {
    static_assert(kColTiles % 4 == 0 || kColTiles == 2);
    if constexpr (kColTiles == 2) {
      uint32_t b[2];
      ptx::ldmatrix_x2_trans(b, tile.band(row, 0));
      ptx::mma_m16n8k8(o[0], a, {b[0]}, T{});
      ptx::mma_m16n8k8(o[1], a, {b[1]}, T{});
    } else {
#pragma unroll
      for (int n = 0; n < kColTiles; n += 4) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, tile.band(row, n));
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::mma_m16n8k8(o[n + i], a, {b[i]}, T{});
      }
    }
  }
};

struct Tf32Product {
  using T = float;
  static constexpr bool kIsExact = false;  // true if operands are not rounded

  template <int kCount>
  __device__ static __forceinline__ void round(uint32_t (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = ptx::to_tf32(__uint_as_float(x[i]));
  }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k8_tf32(d, a, b);
  }

  template <int kTiles, class Tile>
  __device__ static __forceinline__ void add_abt(float (&c)[kTiles][4], const Tile& a, int a_row, const Tile& b) {
    tensor_core_add_abt<Tf32Product>(c, a, a_row, b);
  }

  template <int kTiles, int kColTiles, class Tile>
  __device__ static __forceinline__ void add_pb(float (&o)[kColTiles][4], const float (&p)[kTiles][4], const Tile& b) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      a[j][0] = ptx::to_tf32(p[j][0]);
      a[j][1] = ptx::to_tf32(p[j][2]);
      a[j][2] = ptx::to_tf32(p[j][1]);
      a[j][3] = ptx::to_tf32(p[j][3]);
    }
    add_fragments(o, a, b);
  }

  template <int kTiles, int kColTiles, class PTile, class Tile>
  __device__ static __forceinline__ void add_ptb(float (&o)[kColTiles][4], const PTile& p, int p_col, const Tile& b) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t a[kTiles][4];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int row = 8 * j + 2 * t;
      a[j][0] = ptx::to_tf32(*p.element(row, p_col + g));
      a[j][1] = ptx::to_tf32(*p.element(row, p_col + g + 8));
      a[j][2] = ptx::to_tf32(*p.element(row + 1, p_col + g));
      a[j][3] = ptx::to_tf32(*p.element(row + 1, p_col + g + 8));
    }
    add_fragments(o, a, b);
  }

 private:
  // o += A B over 8 * kTiles rows of B, permuted as described at the top of this file. The outer loop is over columns,
  // so that the addresses of all steps differ only by constants; otherwise each address would need two registers.
  template <int kTiles, int kColTiles, class Tile>
  __device__ static __forceinline__ void add_fragments(float (&o)[kColTiles][4], const uint32_t (&a)[kTiles][4],
                                                       const Tile& tile) {
    const int lane = ptx::opaque(threadIdx.x % 32), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int row = 8 * j + 2 * t;
        const uint32_t b[2] = {ptx::to_tf32(*tile.element(row, 8 * n + g)),
                               ptx::to_tf32(*tile.element(row + 1, 8 * n + g))};
        ptx::mma_m16n8k8_tf32(o[n], a[j], b);
      }
    }
  }
};

struct FloatProduct {
  using T = float;
  static constexpr bool kIsExact = true;  // true if operands are not rounded

  template <int kTiles, class Tile>
  __device__ static __forceinline__ void add_abt(float (&c)[kTiles][4], const Tile& a, int a_row, const Tile& b) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      const float4 a0 = load4(a, a_row + g, chunk), a1 = load4(a, a_row + g + 8, chunk);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float4 b0 = load4(b, 8 * j + 2 * t, chunk), b1 = load4(b, 8 * j + 2 * t + 1, chunk);
        add_dot(c[j][0], a0, b0);
        add_dot(c[j][1], a0, b1);
        add_dot(c[j][2], a1, b0);
        add_dot(c[j][3], a1, b1);
      }
    }
  }

  template <int kTiles, int kColTiles, class Tile>
  __device__ static __forceinline__ void add_pb(float (&o)[kColTiles][4], const float (&p)[kTiles][4], const Tile& b) {
    const int quad = threadIdx.x % 32 / 4 * 4;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      // Lane u of the quad holds columns 2u and 2u + 1 of the tile. The loop is not unrolled, to keep the code small.
#pragma unroll 1
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p0 = __shfl_sync(0xffffffffu, p[j][e], quad + u);
          const float p1 = __shfl_sync(0xffffffffu, p[j][2 + e], quad + u);
          add_row(o, p0, p1, b, 8 * j + 2 * u + e);
        }
      }
    }
  }

  template <int kTiles, int kColTiles, class PTile, class Tile>
  __device__ static __forceinline__ void add_ptb(float (&o)[kColTiles][4], const PTile& p, int p_col, const Tile& b) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll 2
    for (int row = 0; row < 8 * kTiles; ++row) {
      add_row(o, *p.element(row, p_col + g), *p.element(row, p_col + g + 8), b, row);
    }
  }

 private:
  template <class Tile>
  __device__ static __forceinline__ float4 load4(const Tile& tile, int row, int chunk) {
    return *reinterpret_cast<const float4*>(tile.chunk(row, chunk));
  }

  __device__ static __forceinline__ void add_dot(float& sum, float4 a, float4 b) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
  }

  // o += (p0, p1) times one row of B.
  template <int kColTiles, class Tile>
  __device__ static __forceinline__ void add_row(float (&o)[kColTiles][4], float p0, float p1, const Tile& tile,
                                                 int row) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) {
      const float2 b = *reinterpret_cast<const float2*>(tile.element(row, 8 * n + 2 * t));
      o[n][0] = fmaf(p0, b.x, o[n][0]);
      o[n][1] = fmaf(p0, b.y, o[n][1]);
      o[n][2] = fmaf(p1, b.x, o[n][2]);
      o[n][3] = fmaf(p1, b.y, o[n][3]);
    }
  }
};

}  // namespace swinkernels
