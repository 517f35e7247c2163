// Window attention backward with axis_tables (axis_tables.cuh): the additions to the kernels of bwd_long_sm80.cuh.
//
// Maths     dA = dS E^T; dR[i, r of a] = dA[i, c of a] where i_a - c + w_a - 1 = r; dq += dR R; dR_a^T q is the
//           contribution of a window and head to the gradient of table R_a.
// Steps     The first kernel stores A for the query kernel and the key kernel. The query kernel adds dR R to dq and
//           stores dR. The last kernel multiplies dR^T by q: a warp computes 16 rows of the tables' gradients, and
//           keeps their sums over all windows of its block in registers.
// Rounding  dR is rounded to the maps' type once; for float16, it is first scaled by a power of two if it would exceed
//           the range.
// Order     No atomics: reduce_partials.cu adds the blocks' sums in order.
// Traffic   For each query and head, A and dR are written and read, 128 bytes each; q is read two more times.
#pragma once

#include "axis_tables.cuh"
#include "bwd_common.cuh"

namespace swinkernels::cuda {

// The tables, the buffers through which the backward kernels exchange data, and the partial sums of daxis_tables.
struct AxisArguments {
  const float* tables;
  uint32_t* products;  // A: (queries of all windows and heads, kAxisWords)
  uint32_t* drows;     // dR: (queries of all windows and heads, kAxisRows / 2); null if the gradient is not needed
  int32_t* exponents;  // exponents of dR, for float16: (windows, heads, strips)
  float* partials;     // (blocks of the last kernel, rows of both tables, head_dim)
};

template <class Traits>
struct AxisProductsSmem {
  using T = typename Traits::T;
  static constexpr int kBlock = 64, kThreads = 128;
  alignas(128) T q[kBlock * Traits::kHeadDim];
  alignas(16) float products[kBlock * AxisBias<Traits>::kStride];
  AxisTables<Traits> tables;

  template <int kMaps>
  static int bytes(const LongArguments<kMaps>& args) {  // the tokens follow this struct
    const int capacity = (args.num_tokens + kBlock - 1) / kBlock * kBlock;
    return static_cast<int>(sizeof(AxisProductsSmem)) + LongTokens::bytes(LongTokens::terms_of(args.layout), capacity);
  }
};

// Stores A of every query. Each block of four warps loops over windows of one head.
template <class Traits, class Arguments>
__global__ void __launch_bounds__(128)
    window_attention_bwd_axis_products_kernel(const __grid_constant__ Arguments args) {
  using T = typename Traits::T;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using Smem = AxisProductsSmem<Traits>;
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = (args.num_tokens + Smem::kBlock - 1) / Smem::kBlock;
  const BlockShare share = BlockShare::of(args);
  const LongTokens tokens =
      LongTokens::of(dynamic_smem() + sizeof(Smem), LongTokens::terms_of(args.layout), blocks * Smem::kBlock);
  const auto copies = LongCopies<Tile, Smem::kThreads, Smem::kBlock>::of(args);
  tokens.fill_constants(args, blocks * Smem::kBlock);
  smem.tables.fill(args.layout, args.axes.tables, args.head_dim, kLog2E);

  for (uint32_t window = share.first; window < args.items; window += share.step) {
    const WindowIndex index = window_index(args.layout, window);
    __syncthreads();  // the constants are written, and the previous window's tokens are free
    tokens.find_terms(args, index);
    __syncthreads();
    tokens.find_tokens(args, index);
    const uint64_t q_base[1] = {chunk_base(args.regular[0], index.batch, share.head, copies.chunk)};
    uint32_t* const stored = args.axes.products + args.first_query(window, share.head) * kAxisWords;
#pragma unroll 1
    for (int first = 0; first < args.num_tokens; first += Smem::kBlock) {
      __syncthreads();  // the tokens are found, and the previous queries are free
      copies.start(args, {0}, share.head, q_base, {smem.q}, tokens.number, first);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (first + row0 >= args.num_tokens) continue;
      RowFragments<T, Traits::kHeadDim> q;
      q.load(Tile{smem.q}, row0);
      AxisBias<Traits> bias;
      float* const products = smem.products + row0 * bias.kStride;
      bias.set(q, args.layout, smem.tables, tokens.packed + first + row0, products, products + 8 * bias.kStride);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + row0 + g + 8 * half;
        if (row >= args.num_tokens) continue;
        uint32_t* const words = stored + row * kAxisWords + t;
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          words[8 * part] = bias.a[part][half];
          words[8 * part + 4] = bias.a[part][2 + half];
        }
      }
    }
  }
}

// The query kernel's shared memory for axis_tables.
template <class Traits>
struct AxisStripSmem {
  using T = typename Traits::T;
  using DscoreColumns = KeyColumns<T, false>;
  static constexpr int kStride = 2 * kAxisColumns + 8;  // floats per row of dA, padded to avoid bank conflicts

  AxisTables<Traits>* tables;
  __nv_bfloat16* products;  // A of the strip's queries
  T* drows;                 // dR of the strip's queries, which finally replaces A
  float* dproducts;         // dA: (key groups, rows, kStride); finally the first group holds the sum over all groups
  int32_t* exponents;       // exponents of the warps' parts of dA, for float16
  ScoreColumns* columns;
  DscoreColumns* dcolumns;

  static int bytes(int rows, int keys, int key_groups) {
    return static_cast<int>(sizeof(AxisTables<Traits>)) + rows * kAxisRows * 2 + 4 * key_groups * rows * kStride + 128 +
           ScoreColumns::bytes(keys) + DscoreColumns::bytes(keys);
  }
  __device__ __forceinline__ static AxisStripSmem of(SmemArena& arena, int rows, int keys, int key_groups) {
    AxisStripSmem smem;
    smem.tables = arena.take<AxisTables<Traits>>(1);
    smem.products = arena.take<__nv_bfloat16>(rows * kAxisRows);
    smem.drows = reinterpret_cast<T*>(smem.products);
    smem.dproducts = arena.take<float>(key_groups * rows * kStride);
    smem.exponents = arena.take<int32_t>(32);
    smem.columns = reinterpret_cast<ScoreColumns*>(arena.take<unsigned char>(ScoreColumns::bytes(keys)));
    smem.dcolumns = reinterpret_cast<DscoreColumns*>(arena.take<unsigned char>(DscoreColumns::bytes(keys)));
    return smem;
  }
};

// Starts copying rows [first, first + rows) of A to a tile; rows past the window become zero.
__device__ __forceinline__ void copy_axis_products(const uint32_t* products, __nv_bfloat16* tile, int first, int rows,
                                                   int num_tokens) {
  using Tile = SmemTile<__nv_bfloat16, 4 * kAxisColumns>;
  for (int i = threadIdx.x; i < rows * Tile::kChunks; i += blockDim.x) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    __nv_bfloat16* const to = tile + Tile::offset(row, chunk);
    if (first + row < num_tokens) {
      ptx::cp_async_16(ptx::shared_address(to), products + (first + row) * kAxisWords + 4 * chunk);
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Adds a warp's dS E^T for 16 keys to its part of dA; ds is the fragment of dS.
template <class T>
__device__ __forceinline__ void add_dproducts(float (&da)[4][4], const uint32_t (&ds)[4], KeyColumns<T, false>& columns,
                                              int key) {
  uint32_t e[2][4];
  columns.load(e, key);
#pragma unroll
  for (int n = 0; n < 4; ++n) ptx::mma_m16n8k16(da[n], ds, {e[n / 2][n % 2 * 2], e[n / 2][n % 2 * 2 + 1]}, T{});
}

// Computes dR of a strip and `share` (rows, share_stride) = dR R from the key groups' parts of dA, both times 2 **
// -exponent. Returns the exponent, which is the same in all threads. All threads must call this, after a barrier that
// follows the writes to dA; another barrier must precede the reads of `share`.
template <class Traits>
__device__ __forceinline__ int finish_dproducts(const AxisStripSmem<Traits>& smem, const WindowLayout& layout,
                                                const int32_t* packed, int rows, int key_groups, float* share,
                                                int share_stride) {
  using T = typename Traits::T;
  using Smem = AxisStripSmem<Traits>;
  using Tile = SmemTile<T, kAxisRows>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int exponent = 0;
  for (int i = threadIdx.x; i < rows * kAxisColumns / 2; i += blockDim.x) {  // whole warps
    float* const at = smem.dproducts + i / (kAxisColumns / 2) * Smem::kStride + i % (kAxisColumns / 2) * 4;
    float x[1][4] = {};
    for (int n = 0; n < key_groups; ++n) {
      const float4 part = *reinterpret_cast<const float4*>(at + n * rows * Smem::kStride);
      x[0][0] += part.x;
      x[0][1] += part.y;
      x[0][2] += part.z;
      x[0][3] += part.w;
    }
    *reinterpret_cast<float4*>(at) = make_float4(x[0][0], x[0][1], x[0][2], x[0][3]);
    if constexpr (kHasNarrowRange<T>) exponent = max(exponent, excess_exponent(x));
  }
  if constexpr (kHasNarrowRange<T>) {
    if (lane == 0) smem.exponents[warp] = exponent;
  }
  __syncthreads();
  float factor = 1.0f;
  if constexpr (kHasNarrowRange<T>) {
    for (int n = 0; n < static_cast<int>(blockDim.x) / 32; ++n) exponent = max(exponent, smem.exponents[n]);
    factor = power_of_two(-exponent);
  }
  // A lane computes two neighbouring columns of dR, each for one row of the tables. A query with coordinate x uses this
  // row for the key coordinate x + offset.
  int shift[2], offset[2], window[2];
  const float* dproducts[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int first_rows = 2 * layout.window[1] - 1, axis = 2 * lane + n >= first_rows ? 1 : 0;
    shift[n] = PackedToken::kBits * (1 + axis);
    window[n] = layout.window[1 + axis];
    offset[n] = window[n] - 1 - (2 * lane + n - axis * first_rows);
    dproducts[n] = smem.dproducts + axis * kAxisColumns + offset[n];
  }
  for (int query = warp; query < rows; query += blockDim.x / 32) {
    float x[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int coordinate = packed[query] >> shift[n] & PackedToken::kMask, column = coordinate + offset[n];
      const bool met = column >= 0 && column < window[n];
      x[n] = met ? dproducts[n][query * Smem::kStride + coordinate] * factor : 0.0f;
    }
    store2(Tile{smem.drows}.element(query, 2 * lane), x[0], x[1]);
  }
  __syncthreads();

  // The warps that share 16 queries divide the columns of dR R among themselves.
  using Table = typename AxisTables<Traits>::Tile;
  const int group = warp % key_groups, row0 = warp / key_groups * 16;
  const float unit = smem.tables->unit;
#pragma unroll 1
  for (int n = 2 * group; n < Traits::kHeadDimTiles; n += 2 * key_groups) {
    float x[2][4] = {};
#pragma unroll
    for (int step = 0; step < kAxisRows / 16; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, Tile{smem.drows}.square(row0, 2 * step));
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Table{part == 0 ? smem.tables->high : smem.tables->low}.square(16 * step, n));
        ptx::mma_m16n8k16(x[0], a, {b[0], b[1]}, T{});
        ptx::mma_m16n8k16(x[1], a, {b[2], b[3]}, T{});
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float* const to = share + (row0 + g) * share_stride + 8 * (n + j) + 2 * t;
      store2(to, x[j][0] * unit, x[j][1] * unit);
      store2(to + 8 * share_stride, x[j][2] * unit, x[j][3] * unit);
    }
  }
  return exponent;
}

// Stores dR of a strip, in rows of kAxisRows / 2 words.
template <class T>
__device__ __forceinline__ void store_drows(const T* tile, uint32_t* to, int first, int rows, int num_tokens) {
  using Tile = SmemTile<T, kAxisRows>;
  for (int i = threadIdx.x; i < rows * Tile::kChunks; i += blockDim.x) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (first + row >= num_tokens) continue;
    const uint4 x = *reinterpret_cast<const uint4*>(tile + Tile::offset(row, chunk));
    ptx::store_global_16(to + (first + row) * (kAxisRows / 2) + 4 * chunk, x);
  }
}

// Sets `e` to E^T of a warp's 16 keys, as the left operand of products with the queries' rows of A.
__device__ __forceinline__ void key_fragments(RowFragments<__nv_bfloat16, 4 * kAxisColumns>& e, const int32_t* packed) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int axis = 0; axis < 2; ++axis) {
      const int coordinate = PackedToken::coordinate(packed[g + 8 * half], 1 + axis);
      const uint32_t one = coordinate % 2 == 0 ? pack2<__nv_bfloat16>(1.0f, 0.0f) : pack2<__nv_bfloat16>(0.0f, 1.0f);
      e.a[axis][half] = e.a[2 + axis][half] = coordinate / 2 == t ? one : 0;
      e.a[axis][2 + half] = e.a[2 + axis][2 + half] = coordinate / 2 == t + 4 ? one : 0;
    }
  }
}

template <class Traits>
struct AxisSumsSmem {
  using T = typename Traits::T;
  static constexpr int kBlock = 64, kThreads = 128;
  alignas(128) T q[2][kBlock * Traits::kHeadDim];
  alignas(128) T drows[2][kBlock * kAxisRows];

  template <int kMaps>
  static int bytes(const LongArguments<kMaps>& args) {  // the tokens follow this struct
    const int capacity = (args.num_tokens + kBlock - 1) / kBlock * kBlock;
    return static_cast<int>(sizeof(AxisSumsSmem)) + LongTokens::bytes(LongTokens::terms_of(args.layout), capacity);
  }
};

// Sums dR^T q over windows of one head. Each of the four warps computes 16 rows of the tables' gradients.
template <class Traits, class Arguments>
__global__ void __launch_bounds__(128, 4)
    window_attention_bwd_axis_tables_kernel(const __grid_constant__ Arguments args) {
  using T = typename Traits::T;
  using Tile = SmemTile<T, Traits::kHeadDim>;
  using RowTile = SmemTile<T, kAxisRows>;
  using Smem = AxisSumsSmem<Traits>;
  static_assert(Smem::kThreads / 32 * 16 == kAxisRows);
  Smem& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = (args.num_tokens + Smem::kBlock - 1) / Smem::kBlock;
  const BlockShare share = BlockShare::of(args);
  const LongTokens tokens =
      LongTokens::of(dynamic_smem() + sizeof(Smem), LongTokens::terms_of(args.layout), blocks * Smem::kBlock);
  const auto copies = LongCopies<Tile, Smem::kThreads, Smem::kBlock>::of(args);
  const auto lane_offsets = LaneOffsets<Tile>::of();
  const auto row_offsets = LaneOffsets<RowTile>::of();
  tokens.fill_constants(args, blocks * Smem::kBlock);

  float sum[Traits::kHeadDimTiles][4] = {};
  for (uint32_t window = share.first; window < args.items; window += share.step) {
    const WindowIndex index = window_index(args.layout, window);
    const int64_t first_query = args.first_query(window, share.head);
    __syncthreads();  // the constants are written, and the previous window's tokens and tiles are free
    tokens.find_terms(args, index);
    __syncthreads();
    tokens.find_tokens(args, index);
    __syncthreads();
    const uint64_t q_base[1] = {chunk_base(args.regular[0], index.batch, share.head, copies.chunk)};
    const auto copy = [&](int block) {
      const int first = block * Smem::kBlock, stage = block % 2;
      copies.start(args, {0}, share.head, q_base, {smem.q[stage]}, tokens.number, first);
      const uint32_t* const drows = args.axes.drows + first_query * (kAxisRows / 2);
#pragma unroll
      for (int i = 0; i < Smem::kBlock * RowTile::kChunks / Smem::kThreads; ++i) {
        const int at = threadIdx.x + i * Smem::kThreads, row = at / RowTile::kChunks, chunk = at % RowTile::kChunks;
        T* const to = smem.drows[stage] + RowTile::offset(row, chunk);
        if (first + row < args.num_tokens) {
          ptx::cp_async_16(ptx::shared_address(to), drows + (first + row) * (kAxisRows / 2) + 4 * chunk);
        } else {
          *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
        }
      }
      ptx::cp_async_commit();
    };
    copy(0);
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (block + 1 < blocks) copy(block + 1);
      const LocatedTile<Tile> q{smem.q[block % 2], lane_offsets};
      const LocatedTile<RowTile> drows{smem.drows[block % 2], row_offsets};
#pragma unroll
      for (int step = 0; step < Smem::kBlock / 16; ++step) {
        const int query = block * Smem::kBlock + 16 * step;
        if (query >= args.num_tokens) break;
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, drows.transposed_square(16 * step, row0 / 8));
        [[maybe_unused]] int exponent = 0;
        if constexpr (kHasNarrowRange<T>) {
          const int64_t unit = static_cast<int64_t>(window) * args.num_heads + share.head;
          exponent = args.axes.exponents[unit * args.strips + query / 16 / args.row_tiles];
        }
        if (exponent == 0) {
          add_fragment_b<T>(sum, a, q, 16 * step);
        } else {
          float x[Traits::kHeadDimTiles][4] = {};
          add_fragment_b<T>(x, a, q, 16 * step);
          const float factor = power_of_two(exponent);
#pragma unroll
          for (int n = 0; n < Traits::kHeadDimTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[n][e] = fmaf(x[n][e], factor, sum[n][e]);
          }
        }
      }
    }
  }
  const int rows = axis_rows(args.layout);
  float* const partial = args.axes.partials + static_cast<int64_t>(blockIdx.x) * rows * args.head_dim;
#pragma unroll
  for (int n = 0; n < Traits::kHeadDimTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = row0 + g + e / 2 * 8, col = 8 * n + 2 * t + e % 2;
      if (row < rows && col < args.head_dim) partial[row * args.head_dim + col] = sum[n][e];
    }
  }
}

}  // namespace swinkernels::cuda
