// Products of bfloat16 matrices in AMX's tiles: 16 rows of 64 bytes, which hold 16 units or 16 floats.
//
// A product multiplies a tile of a weight's rows, where they lie, by a tile of 16 units of 16 of a panel's rows, and adds
// the result to a tile of the panel of sums. So panels need no other layout than for products of vectors, which compute
// the rows and the units that do not fill a tile. AMX treats subnormal numbers as 0, in factors and in sums.
//
// If SWINKERNELS_AMX is not defined, arrays take the place of the tile registers, so that every machine can test the
// code that uses them. Subnormal numbers then keep their values.
#pragma once
#include "arena.inl"

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

constexpr int64_t kTile = 16;  // rows of a tile; units or floats of its rows

#ifdef SWINKERNELS_AMX

// Configures this thread's tile registers while it exists.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTile;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { __asm__ volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Assembly takes the place of GCC's intrinsics, which do not accept a template's constants and do not say that they
// access memory. `stride` is in bytes.
template <int kRegister>
SWINKERNELS_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kRegister) : "memory");
}
template <int kRegister>
SWINKERNELS_INLINE void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kRegister) : "memory");
}
template <int kRegister>
SWINKERNELS_INLINE void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}
// Adds the products of the tiles kA (rows of units) and kB (units of columns) to the tile kSums.
template <int kSums, int kA, int kB>
SWINKERNELS_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

#else

class TileRegisters {
 public:
  TileRegisters() {}
  ~TileRegisters() {}
};

thread_local float tile_registers[8][kTile * kTile];

template <int kRegister>
SWINKERNELS_INLINE void load_tile(const void* from, int64_t stride) {
  for (int64_t r = 0; r < kTile; ++r) {
    __builtin_memcpy(tile_registers[kRegister] + r * kTile, static_cast<const char*>(from) + r * stride, 64);
  }
}
template <int kRegister>
SWINKERNELS_INLINE void store_tile(void* to, int64_t stride) {
  for (int64_t r = 0; r < kTile; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * stride, tile_registers[kRegister] + r * kTile, 64);
  }
}
template <int kRegister>
SWINKERNELS_INLINE void clear_tile() {
  __builtin_memset(tile_registers[kRegister], 0, sizeof(tile_registers[kRegister]));
}
template <int kSums, int kA, int kB>
SWINKERNELS_INLINE void multiply_tiles() {
  for (int64_t r = 0; r < kTile; ++r) {
    Vec of_numbers[2] = {};
    for (int64_t u = 0; u < kTile; ++u) {
      Vec a[2], b[2];
      BFloat16Units::split(splat(tile_registers[kA][r * kTile + u]), a);
      BFloat16Units::split(load(tile_registers[kB] + u * kTile), b);
      for (int i = 0; i < 2; ++i) of_numbers[i] += a[i] * b[i];
    }
    float* sums = tile_registers[kSums] + r * kTile;
    store(sums, load(sums) + (of_numbers[0] + of_numbers[1]));
  }
}

#endif

// Computes kRowTiles by kColumnTiles tiles of c = a b + addend, for `steps` tiles along the units; see matmul_tile. With
// two of each, every tile that is loaded is multiplied twice. Fetches `fetched` rows of the matrix `next` into L2.
template <int kRowTiles, int kColumnTiles>
void multiply_in_tiles(int64_t steps, const uint16_t* a, int64_t lda, const float* b, int64_t ldb, const float* addend,
                       float* c, int64_t ldc, const uint16_t* next, int64_t fetched) {
  constexpr bool kTwoRows = kRowTiles == 2, kTwoColumns = kColumnTiles == 2, kFour = kTwoRows && kTwoColumns;
  const int64_t a_bytes = lda * sizeof(*a), b_bytes = ldb * sizeof(*b), c_bytes = ldc * sizeof(*c);
  if (addend == nullptr) {
    clear_tile<0>();
    if constexpr (kTwoColumns) clear_tile<1>();
    if constexpr (kTwoRows) clear_tile<2>();
    if constexpr (kFour) clear_tile<3>();
  } else {
    load_tile<0>(addend, c_bytes);
    if constexpr (kTwoColumns) load_tile<1>(addend + kTile, c_bytes);
    if constexpr (kTwoRows) load_tile<2>(addend + kTile * ldc, c_bytes);
    if constexpr (kFour) load_tile<3>(addend + kTile * ldc + kTile, c_bytes);
  }
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t r = 0; r < fetched; ++r) __builtin_prefetch(next + r * lda + step * 2 * kTile, 0, 2);
    load_tile<4>(a, a_bytes);
    load_tile<6>(b, b_bytes);
    multiply_tiles<0, 4, 6>();
    if constexpr (kTwoColumns) {
      load_tile<7>(b + kTile, b_bytes);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (kTwoRows) {
      load_tile<5>(a + kTile * lda, a_bytes);
      multiply_tiles<2, 5, 6>();
    }
    if constexpr (kFour) multiply_tiles<3, 5, 7>();
    a += 2 * kTile;
    b += kTile * ldb;
  }
  store_tile<0>(c, c_bytes);
  if constexpr (kTwoColumns) store_tile<1>(c + kTile, c_bytes);
  if constexpr (kTwoRows) store_tile<2>(c + kTile * ldc, c_bytes);
  if constexpr (kFour) store_tile<3>(c + kTile * ldc + kTile, c_bytes);
}

// c (rows, columns) = a b + addend, for matrices that consist of whole tiles. The blocks of tiles fetch equal parts of the
// rows to fetch, so that the weights arrive at the rate at which they are multiplied.
void matmul_in_tiles(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda, const float* b,
                     int64_t ldb, const float* addend, float* c, int64_t ldc, Fetch<uint16_t> fetch) {
  constexpr int64_t kBlock = 2 * kTile;
  const int64_t steps = depth / kTile, blocks = round_up(rows, kBlock) / kBlock * (round_up(columns, kBlock) / kBlock);
  int64_t block = 0, fetched = 0;
  for (int64_t j = 0; j < columns; j += kBlock) {
    for (int64_t i = 0; i < rows; i += kBlock) {
      const bool two_rows = i + kTile < rows, two_columns = j + kTile < columns;
      const auto multiply = two_rows      ? two_columns ? multiply_in_tiles<2, 2> : multiply_in_tiles<2, 1>
                            : two_columns ? multiply_in_tiles<1, 2>
                                          : multiply_in_tiles<1, 1>;
      const int64_t until = fetch.rows * ++block / blocks;
      multiply(steps, a + i * lda, lda, b + j, ldb, addend == nullptr ? nullptr : addend + i * ldc + j, c + i * ldc + j,
               ldc, fetch.matrix + fetched * lda, until - fetched);
      fetched = until;
    }
  }
}

// c = a b + addend for any matrices. Vectors multiply the rows and the units that do not fill a tile.
template <>
void matmul_fetching<TiledUnits>(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda,
                                 const float* b, int64_t ldb, const float* addend, float* c, int64_t ldc,
                                 Fetch<uint16_t> fetch) {
  const int64_t tiled_depth = depth / kTile * kTile;
  int64_t tiled_rows = depth < kTile ? 0 : rows / kTile * kTile;
  if (tiled_rows > 0) {
    matmul_in_tiles(tiled_rows, columns, tiled_depth, a, lda, b, ldb, addend, c, ldc, fetch);
    // The last rows share a tile with rows before them, which are computed twice. They must not be added twice.
    if (tiled_rows < rows && addend != c) {
      const int64_t first = rows - kTile;
      matmul_in_tiles(kTile, columns, tiled_depth, a + first * lda, lda, b, ldb,
                      addend == nullptr ? nullptr : addend + first * ldc, c + first * ldc, ldc, {});
      tiled_rows = rows;
    }
    if (tiled_depth < depth) {
      matmul<false, BFloat16Units>(tiled_rows, columns, depth - tiled_depth, a + 2 * tiled_depth, lda,
                                   b + tiled_depth * ldb, ldb, c, c, ldc);
    }
  }
  if (tiled_rows < rows) {
    matmul<false, BFloat16Units>(rows - tiled_rows, columns, depth, a + tiled_rows * lda, lda, b, ldb,
                                 addend == nullptr ? nullptr : addend + tiled_rows * ldc, c + tiled_rows * ldc, ldc);
  }
}

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
