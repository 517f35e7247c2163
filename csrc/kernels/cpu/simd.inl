// Vectors of floats, and the CPU kernels' functions on vectors: conversions, exp, log and square root, dot products of
// rows, a transpose, a small matmul.
//
// Each instruction set's source file includes this file once, after all other headers and under that set's target
// pragma. Before it includes this file, it defines
//   SWINKERNELS_ISA      the namespace of the code for this set
//   SWINKERNELS_LANES    number of floats in a vector
//   SWINKERNELS_AVX      defined if <immintrin.h> has float16 conversions and square roots for such vectors
//   SWINKERNELS_BF16     defined if <immintrin.h> has bfloat16 conversions and products for such vectors
// The linker merges inline functions and templates that several object files share; it may keep the AVX-512 copy, which
// then runs on a machine without AVX-512. So everything here has internal linkage and calls nothing in std::.

namespace swinkernels::cpu::SWINKERNELS_ISA {
namespace {

#define SWINKERNELS_INLINE inline __attribute__((always_inline))

constexpr int kLanes = SWINKERNELS_LANES;

// Values have type Vec; VecMemory is the same vector in memory, aligned like a float.
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float VecMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));
typedef uint16_t HalfMemory __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

SWINKERNELS_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecMemory*>(p); }
SWINKERNELS_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecMemory*>(p) = x; }
SWINKERNELS_INLINE Int load(const int32_t* p) { return *reinterpret_cast<const IntMemory*>(p); }
SWINKERNELS_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

template <int kValue_>
struct Constant {
  static constexpr int kValue = kValue_;
};

template <int... kIndices>
struct Indices {};
template <int kCount, int... kTail>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kTail...> {};
template <int... kTail>
struct MakeIndices<0, kTail...> {
  using Type = Indices<kTail...>;
};
using AllLanes = MakeIndices<kLanes>::Type;

// Initialising every lane compiles to one broadcast; Vec{} + x would compile to an addition, because 0 + -0 is not -0.
template <int... I>
SWINKERNELS_INLINE Vec splat_lanes(float x, Indices<I...>) {
  return Vec{((void)I, x)...};
}
SWINKERNELS_INLINE Vec splat(float x) { return splat_lanes(x, AllLanes()); }
SWINKERNELS_INLINE Int splat(int32_t x) { return Int{} + x; }

template <int... I>
SWINKERNELS_INLINE Int lane_numbers(Indices<I...>) {
  return Int{I...};
}

// Returns a mask with all bits set in the first `count` lanes and none in the others.
SWINKERNELS_INLINE Int first_lanes(int64_t count) {
  return lane_numbers(AllLanes()) < splat(static_cast<int32_t>(count));
}

// ---- Conversion of rows ----

SWINKERNELS_INLINE Vec widen_bfloat16(HalfBits h) { return (Vec)(__builtin_convertvector(h, Bits) << 16); }

// Returns bits whose upper halves are x, rounded to bfloat16.
SWINKERNELS_INLINE Bits bfloat16_bits(Vec x) {
  const Bits bits = (Bits)x;
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const Bits quiet_nan = bits | 0x400000;
  return (bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded;
}
SWINKERNELS_INLINE Vec round_to_bfloat16(Vec x) { return (Vec)(bfloat16_bits(x) & 0xffff0000u); }

SWINKERNELS_INLINE HalfBits narrow_bfloat16(Vec x) {
#ifdef SWINKERNELS_BF16
  return (HalfBits)_mm512_cvtneps_pbh((__m512)x);  // subnormal numbers become 0
#else
  return __builtin_convertvector(bfloat16_bits(x) >> 16, HalfBits);
#endif
}

#ifdef SWINKERNELS_AVX
SWINKERNELS_INLINE Vec widen_float16(HalfBits h) {
#if SWINKERNELS_LANES == 16
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#else
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#endif
}
SWINKERNELS_INLINE HalfBits narrow_float16(Vec x) {
#if SWINKERNELS_LANES == 16
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  return (HalfBits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
}
#else
SWINKERNELS_INLINE Vec widen_float16(HalfBits h) {
  const Bits bits = __builtin_convertvector(h, Bits);
  // Shifts exponent and mantissa to their positions in float32; the multiplication corrects the exponent's bias and
  // normalises subnormal numbers. In both formats, the exponent bits of infinities and NaN are all ones.
  const Vec finite = (Vec)((bits & 0x7fff) << 13) * 0x1p112f;
  const Bits special = (bits & 0x7c00) == 0x7c00 ? Bits{} + 0x7f800000u : Bits{};
  return (Vec)((Bits)finite | special | (bits & 0x8000) << 16);
}
SWINKERNELS_INLINE HalfBits narrow_float16(Vec x) {
  const Bits bits = (Bits)x & 0x7fffffff;
  const Bits sign = ((Bits)x & 0x80000000u) >> 16;
  // Normal: correct the exponent's bias and round the mantissa, to nearest, ties to even; a carry raises the exponent.
  const Bits normal = (bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13;
  // Subnormal: adding 0.5, whose last mantissa bit is worth 2^-24, rounds the value to a multiple of 2^-24.
  const Bits subnormal = (Bits)((Vec)bits + 0.5f) - 0x3f000000u;
  const Bits special = bits > 0x7f800000 ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  Bits half = bits < 0x38800000 ? subnormal : normal;
  half = bits >= 0x47800000 ? special : half;  // 2^16 and above; a value that rounds up to 2^16 is infinity already
  return __builtin_convertvector(half | sign, HalfBits);
}
#endif

struct Float32 {
  using Element = float;
  using Memory = VecMemory;
  static SWINKERNELS_INLINE Vec widen(Vec x) { return x; }
  static SWINKERNELS_INLINE Vec narrow(Vec x) { return x; }
};
struct Float16 {
  using Element = uint16_t;
  using Memory = HalfMemory;
  static SWINKERNELS_INLINE Vec widen(HalfBits x) { return widen_float16(x); }
  static SWINKERNELS_INLINE HalfBits narrow(Vec x) { return narrow_float16(x); }
};
struct BFloat16 {
  using Element = uint16_t;
  using Memory = HalfMemory;
  static SWINKERNELS_INLINE Vec widen(HalfBits x) { return widen_bfloat16(x); }
  static SWINKERNELS_INLINE HalfBits narrow(Vec x) { return narrow_bfloat16(x); }
};

// to[0..count) = from[0..count), converted to float32; the remaining lanes of the last vector become zero.
template <class Format>
SWINKERNELS_INLINE void load_row(const void* from, int64_t count, float* to) {
  using Memory = typename Format::Memory;
  const auto* source = static_cast<const typename Format::Element*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(to + i, Format::widen(*reinterpret_cast<const Memory*>(source + i)));
  }
  if (i < count) {
    typename Format::Element tail[kLanes] = {};
    for (int64_t j = i; j < count; ++j) tail[j - i] = source[j];
    store(to + i, Format::widen(*reinterpret_cast<const Memory*>(tail)));
  }
}

// to[0..count) = from[0..count) * factor, rounded to the format. `from` is padded to whole vectors.
template <class Format>
SWINKERNELS_INLINE void store_row(const float* from, int64_t count, float factor, void* to) {
  using Memory = typename Format::Memory;
  auto* target = static_cast<typename Format::Element*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    *reinterpret_cast<Memory*>(target + i) = Format::narrow(load(from + i) * factor);
  }
  if (i < count) {
    typename Format::Element tail[kLanes];
    *reinterpret_cast<Memory*>(tail) = Format::narrow(load(from + i) * factor);
    for (int64_t j = i; j < count; ++j) target[j] = tail[j - i];
  }
}

// ---- Elementary functions ----

// Returns exp(x) for x of at most about 88, within 1.1 ulp; below the smallest normal number the result is 0.
SWINKERNELS_INLINE Vec exp(Vec x) {
  // exp(x) = 2^n * exp(r) with n = round(x / ln 2); adding 1.5 * 2^23 leaves n in the last bits of the mantissa.
  const Vec shifted = x * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
  // (exp(r) - 1 - r) / r^2, minimax for |r| <= ln(2) / 2; the relative error of exp(r) is 3.1e-9.
  Vec p = splat(1.3814467e-3f);
  p = p * r + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 1.6666520e-1f;
  p = p * r + 4.9999994e-1f;
  const Vec fraction = (p * r) * r + r + 1.0f;
  const Vec scale = (Vec)(((Bits)shifted << 23) + (127u << 23));  // unsigned, because it overflows if x is out of range
  return x < splat(-87.33654f) ? Vec{} : fraction * scale;        // NaN stays NaN
}

// Returns 2^x for a result that is rounded to bfloat16, for x of -125 to 127, with a relative error below 8e-5.
SWINKERNELS_INLINE Vec exp2_low(Vec x) {
  const Vec shifted = x + 12582912.0f;  // as in exp
  const Vec r = x - (shifted - 12582912.0f);
  const Vec power = ((5.517167e-2f * r + 0.24261113f) * r + 0.69326099f) * r + 0.99992807f;  // minimax for |r| <= 1/2
  return power * (Vec)(((Bits)shifted << 23) + (127u << 23));                                // NaN stays NaN
}

// Returns exp(x) for a result that is rounded to bfloat16, for x of at most 0; below -86 the result is 0.
SWINKERNELS_INLINE Vec exp_low(Vec x) { return x < splat(-86.0f) ? Vec{} : exp2_low(x * 1.44269504f); }

// Returns the natural logarithm of a normal positive number, within 1.5 ulp; NaN for infinity and NaN.
SWINKERNELS_INLINE Vec log(Vec x) {
  // x = 2^n * m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)).
  const Int n = (Int)((Bits)x - 0x3f3504f3u) >> 23;  // sqrt(1/2)
  const Vec m = (Vec)((Bits)x - ((Bits)n << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f), square = s * s;
  const Vec series = (((square * 0.11111111f + 0.14285714f) * square + 0.2f) * square + 0.33333333f) * square;
  const Vec low = __builtin_convertvector(n, Vec);
  return ((s + s) * series + (s + s)) + low * 0.69314718f + (x - x);
}

// Returns the square root, correctly rounded.
SWINKERNELS_INLINE Vec sqrt(Vec x) {
#if defined(SWINKERNELS_AVX) && SWINKERNELS_LANES == 16
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(SWINKERNELS_AVX)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// ---- Matrices in scratch memory: row-major, rows padded to whole vectors ----

template <int kStep>
constexpr int interleaved(int lane, bool odd) {
  // The element of (a, b) that becomes this lane of the even or odd result when blocks of kStep lanes are exchanged.
  return (lane & kStep) == 0 ? (odd ? lane + kStep : lane) : (odd ? kLanes + lane : kLanes + lane - kStep);
}

template <int kStep, int... I>
SWINKERNELS_INLINE void exchange(Vec& a, Vec& b, Indices<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const Vec even = __builtin_shufflevector(a, b, interleaved<kStep>(I, false)...);
  const Vec odd = __builtin_shufflevector(a, b, interleaved<kStep>(I, true)...);
#else
  const Vec even = __builtin_shuffle(a, b, Int{interleaved<kStep>(I, false)...});
  const Vec odd = __builtin_shuffle(a, b, Int{interleaved<kStep>(I, true)...});
#endif
  a = even;
  b = odd;
}

template <int kStep>
SWINKERNELS_INLINE void exchange_rows(Vec (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep], AllLanes());
    }
    exchange_rows<2 * kStep>(rows);
  }
}

// to (columns, ld_to) = factor times the transpose of from (rows, ld_from); rows and columns are multiples of kLanes.
void transpose(const float* from, int64_t rows, int64_t columns, int64_t ld_from, float factor, float* to,
               int64_t ld_to) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) block[r] = load(from + (i + r) * ld_from + j);
      exchange_rows<1>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * ld_to + i, block[r] * factor);
    }
  }
}

// to (columns, ld_to) = the transpose of from (rows, ld_from), for any numbers of rows and columns.
[[maybe_unused]] void transpose_any(const float* from, int64_t rows, int64_t columns, int64_t ld_from, float* to,
                                    int64_t ld_to) {
  const int64_t whole_rows = rows / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
  transpose(from, whole_rows, whole_columns, ld_from, 1.0f, to, ld_to);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) to[j * ld_to + i] = from[i * ld_from + j];
  }
}

// Sets lane r of rows[0] to the sum of the lanes of rows[r]. This is a tree reduction: each step halves the number of
// vectors, and each remaining vector holds partial sums of twice as many rows.
template <int kStep>
SWINKERNELS_INLINE void sum_lanes(Vec (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += 2 * kStep) {
      exchange<kStep>(rows[i], rows[i + kStep], AllLanes());
      rows[i] += rows[i + kStep];
    }
    sum_lanes<2 * kStep>(rows);
  }
}

// Returns, in lane r, the dot product of row r of a and row r of b, for kLanes consecutive rows. `columns`, the length
// of a row, is a multiple of kLanes.
SWINKERNELS_INLINE Vec row_products(const float* a, const float* b, int64_t columns) {
  Vec sums[kLanes] = {};
  for (int64_t c = 0; c < columns; c += kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) sums[r] += load(a + r * columns + c) * load(b + r * columns + c);
  }
  sum_lanes<1>(sums);
  return sums[0];
}

// ---- Products ----

// A unit is the 4 bytes that one lane of a product multiplies: one float32 number, or two bfloat16 numbers, whose two
// products are added. A vector of units has the type Vec.
struct Float32Units {
  using Format = Float32;  // of rows and weights in memory
  using Element = float;
  using InPanel = Float32Units;       // what a product multiplies
  static constexpr int kNumbers = 1;  // in a unit
  static SWINKERNELS_INLINE Vec load(const float* from) { return SWINKERNELS_ISA::load(from); }
  static SWINKERNELS_INLINE Vec add_products(Vec sums, Vec a, Vec b) { return sums + a * b; }
  static SWINKERNELS_INLINE void split(Vec units, Vec (&numbers)[1]) { numbers[0] = units; }
  static SWINKERNELS_INLINE Vec join(const Vec (&numbers)[1]) { return numbers[0]; }
  // Stores the units of consecutive numbers.
  static SWINKERNELS_INLINE void store(float* to, Vec numbers) { SWINKERNELS_ISA::store(to, numbers); }
  // Returns exp(x) as exactly as the format needs, for x of at most 0.
  static SWINKERNELS_INLINE Vec exp(Vec x) { return SWINKERNELS_ISA::exp(x); }
};

struct BFloat16Units {
  using Format = BFloat16;
  using Element = uint16_t;
  using InPanel = BFloat16Units;
  static constexpr int kNumbers = 2;
  static SWINKERNELS_INLINE Vec load(const uint16_t* from) {
    Vec units;
    __builtin_memcpy(&units, from, sizeof(units));
    return units;
  }
  static SWINKERNELS_INLINE Vec add_products(Vec sums, Vec a, Vec b) {
#ifdef SWINKERNELS_BF16
    return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    Vec x[2], y[2];
    split(a, x);
    split(b, y);
    return sums + x[0] * y[0] + x[1] * y[1];
#endif
  }
  static SWINKERNELS_INLINE void split(Vec units, Vec (&numbers)[2]) {
    numbers[0] = (Vec)((Bits)units << 16);
    numbers[1] = (Vec)((Bits)units & 0xffff0000u);
  }
  static SWINKERNELS_INLINE Vec join(const Vec (&numbers)[2]) {
#ifdef SWINKERNELS_BF16
    return interleave((Vec)_mm512_cvtne2ps_pbh((__m512)numbers[1], (__m512)numbers[0]), AllLanes());
#else
    const Bits low = __builtin_convertvector(narrow_bfloat16(numbers[0]), Bits);
    return (Vec)(low | __builtin_convertvector(narrow_bfloat16(numbers[1]), Bits) << 16);
#endif
  }
  static SWINKERNELS_INLINE void store(float* to, Vec numbers) {
    *reinterpret_cast<HalfMemory*>(to) = narrow_bfloat16(numbers);
  }
  static SWINKERNELS_INLINE Vec exp(Vec x) { return exp_low(x); }

 private:
#ifdef SWINKERNELS_BF16
  // Returns units of the numbers of both halves of a vector.
  template <int... I>
  static SWINKERNELS_INLINE Vec interleave(Vec halves, Indices<I...>) {
    const Bits order = {(I | (I + kLanes) << 16)...};
    return (Vec)_mm512_maskz_permutexvar_epi16(0xffffffff, (__m512i)order, (__m512i)halves);
  }
#endif
};

// bfloat16 numbers that are multiplied in tiles (see tiles.inl).
struct TiledUnits : BFloat16Units {
  using InPanel = TiledUnits;
};

// bfloat16 numbers that become float32 numbers before they are multiplied, for CPUs without products of bfloat16. join and
// store round to bfloat16 first, so that the factors of a product are the same numbers on all CPUs.
struct WidenedUnits {
  using Format = BFloat16;
  using Element = uint16_t;
  using InPanel = Float32Units;
  static constexpr int kNumbers = 1;
  static SWINKERNELS_INLINE Vec load(const uint16_t* from) {
    return widen_bfloat16(*reinterpret_cast<const HalfMemory*>(from));
  }
  static SWINKERNELS_INLINE void split(Vec units, Vec (&numbers)[1]) { numbers[0] = units; }
  static SWINKERNELS_INLINE Vec join(const Vec (&numbers)[1]) { return round_to_bfloat16(numbers[0]); }
  static SWINKERNELS_INLINE void store(float* to, Vec numbers) {
    SWINKERNELS_ISA::store(to, round_to_bfloat16(numbers));
  }
  static SWINKERNELS_INLINE Vec exp(Vec x) { return exp_low(x); }
};

// Returns a vector whose lanes are all equal to one unit.
template <class Element>
SWINKERNELS_INLINE Vec splat_unit(const Element* from) {
  float unit;
  __builtin_memcpy(&unit, from, sizeof(unit));
  return splat(unit);
}

// Adds the products of column k of a and row k of b to the sums of a tile.
template <int kRows, int kVectors, bool kTransposed, class Units>
SWINKERNELS_INLINE void add_products(Vec (&sums)[kRows][kVectors], int64_t k, const typename Units::Element* a,
                                     int64_t lda, const float* b, int64_t ldb) {
  Vec row[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec factor = splat_unit(kTransposed ? a + k * lda + r * Units::kNumbers : a + r * lda + k * Units::kNumbers);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Units::add_products(sums[r][v], factor, row[v]);
  }
}

constexpr int64_t kLine = 16;  // floats in a cache line

// Computes a tile of c = a b + addend in registers. a is a matrix of units (rows, depth), or (depth, rows) if kTransposed,
// whose rows are lda elements apart, b is one of units (depth, columns), and c is one of floats. The addend, which may be
// c itself, or null for zero, has c's layout and is added last. If kFetches, fetches the same part of the matrix `next`,
// which has the layout of a: a processor's own prefetching does not follow a tile from one row to the next.
template <int kRows, int kVectors, bool kTransposed, bool kFetches, class Units>
void matmul_tile(int64_t depth, const typename Units::Element* a, int64_t lda, const float* b, int64_t ldb,
                 const float* addend, float* c, int64_t ldc, const typename Units::Element* next) {
  Vec sums[kRows][kVectors] = {};
  int64_t k = 0;
  if constexpr (kFetches) {
    for (; k + kLine <= depth; k += kLine) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(next + r * lda + k * Units::kNumbers);
      for (int64_t i = k; i < k + kLine; ++i)
        add_products<kRows, kVectors, kTransposed, Units>(sums, i, a, lda, b, ldb);
    }
  }
  for (; k < depth; ++k) add_products<kRows, kVectors, kTransposed, Units>(sums, k, a, lda, b, ldb);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int64_t offset = r * ldc + v * kLanes;
      store(c + offset, addend == nullptr ? sums[r][v] : sums[r][v] + load(addend + offset));
    }
  }
}

// The size of a tile in rows and vectors: the sums, a row of b and one factor must fit in the registers. AVX-512 and
// aarch64 have 32 registers, the others 16.
#if SWINKERNELS_LANES == 16 || defined(__aarch64__)
constexpr int kTileVectors = 4;
constexpr int tile_rows(int vectors) { return vectors == 4 ? 6 : 8; }
#else
constexpr int kTileVectors = 2;
constexpr int tile_rows(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

template <int kRows, int kVectors, bool kTransposed, bool kFetches, class Units>
SWINKERNELS_INLINE void matmul_tile_of(int64_t rows, int64_t depth, const typename Units::Element* a, int64_t lda,
                                       const float* b, int64_t ldb, const float* addend, float* c, int64_t ldc,
                                       const typename Units::Element* next) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return matmul_tile_of<kRows - 1, kVectors, kTransposed, kFetches, Units>(rows, depth, a, lda, b, ldb, addend, c,
                                                                               ldc, next);
    }
  }
  matmul_tile<kRows, kVectors, kTransposed, kFetches, Units>(depth, a, lda, b, ldb, addend, c, ldc, next);
}

template <int kVectors, bool kTransposed, bool kFetches, class Units>
void matmul_panel(int64_t rows, int64_t depth, const typename Units::Element* a, int64_t lda, const float* b,
                  int64_t ldb, const float* addend, float* c, int64_t ldc, const typename Units::Element* next) {
  // All tiles have nearly the same height: a last tile of few rows would have too few independent sums to hide the
  // latency of multiplication.
  constexpr int kMaxRows = tile_rows(kVectors);
  const int64_t tiles = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t i = 0, tile = 0; tile < tiles; ++tile) {
    const int64_t height = (rows - i) / (tiles - tile);
    const float* addend_i = addend == nullptr ? nullptr : addend + i * ldc;
    const auto* next_i = kFetches && tile + 1 < tiles ? a + (i + height) * lda : next;
    matmul_tile_of<kMaxRows, kVectors, kTransposed, kFetches, Units>(height, depth,
                                                                     a + (kTransposed ? i * Units::kNumbers : i * lda),
                                                                     lda, b, ldb, addend_i, c + i * ldc, ldc, next_i);
    i += height;
  }
}

// c (rows, columns) = a b + addend; columns is a multiple of kLanes. If a is unlikely to be in a cache, `next` is the
// matrix, in a's layout, that the next call multiplies, or a itself if there is none.
template <bool kTransposed, class Units>
SWINKERNELS_INLINE void matmul_with(int64_t rows, int64_t columns, int64_t depth, const typename Units::Element* a,
                                    int64_t lda, const float* b, int64_t ldb, const float* addend, float* c,
                                    int64_t ldc, const typename Units::Element* next) {
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j) / kLanes;
    const float* addend_j = addend == nullptr ? nullptr : addend + j;
    const auto panel = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::kValue;
      if (next != nullptr && j == 0) {
        matmul_panel<kVectors, kTransposed, true, Units>(rows, depth, a, lda, b, ldb, addend, c, ldc, next);
      } else {
        matmul_panel<kVectors, kTransposed, false, Units>(rows, depth, a, lda, b + j, ldb, addend_j, c + j, ldc,
                                                          nullptr);
      }
      j += decltype(vectors)::kValue * kLanes;
    };
    if (left >= kTileVectors) {
      panel(Constant<kTileVectors>());
    } else if (left == 3) {
      panel(Constant < kTileVectors<3 ? 1 : 3>());
    } else if (left == 2) {
      panel(Constant < kTileVectors<2 ? 1 : 2>());
    } else {
      panel(Constant<1>());
    }
  }
}

template <bool kTransposed, class Units = Float32Units>
void matmul(int64_t rows, int64_t columns, int64_t depth, const typename Units::Element* a, int64_t lda, const float* b,
            int64_t ldb, const float* addend, float* c, int64_t ldc) {
  matmul_with<kTransposed, Units>(rows, columns, depth, a, lda, b, ldb, addend, c, ldc, nullptr);
}

// Rows of a matrix with the layout of a product's first factor, which the product fetches for a later one.
template <class Element>
struct Fetch {
  const Element* matrix = nullptr;
  int64_t rows = 0;
};

template <class Units>
void matmul_fetching(int64_t rows, int64_t columns, int64_t depth, const typename Units::Element* a, int64_t lda,
                     const float* b, int64_t ldb, const float* addend, float* c, int64_t ldc,
                     Fetch<typename Units::Element> fetch = {}) {
  matmul_with<false, Units>(rows, columns, depth, a, lda, b, ldb, addend, c, ldc, fetch.matrix);
}

}  // namespace
}  // namespace swinkernels::cpu::SWINKERNELS_ISA
