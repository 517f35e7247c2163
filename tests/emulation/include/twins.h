// Emulated versions of csrc/kernels/common/ptx.cuh and launch.cuh. This header is included before every kernel source
// (g++ -include) and defines the include guards of the originals, so that these are skipped wherever they are included.
#pragma once

#define SWINKERNELS_KERNELS_COMMON_PTX_CUH_
#define SWINKERNELS_KERNELS_COMMON_LAUNCH_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <tuple>
#include <utility>

namespace emulation {

inline float low_float(uint32_t pair, __half) { return emulated_half_to_float(static_cast<uint16_t>(pair)); }
inline float high_float(uint32_t pair, __half) { return emulated_half_to_float(static_cast<uint16_t>(pair >> 16)); }
inline float low_float(uint32_t pair, __nv_bfloat16) { return __uint_as_float(pair << 16); }
inline float high_float(uint32_t pair, __nv_bfloat16) { return __uint_as_float(pair & 0xffff0000u); }

struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// d (16 x 8, distributed over the lanes) += a * b in float.
template <int K>
inline void multiply(const float (&a)[16][K], const float (&b)[K][8], void* const (&operands)[kWarpSize]) {
  float d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const float* own = static_cast<MmaOperand*>(operands[lane])->d;
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = own[i];
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    float* own = static_cast<MmaOperand*>(operands[lane])->d;
    for (int i = 0; i < 4; ++i) own[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

// mma with 16-bit operands: K / 8 registers for each half of A's rows, and K / 8 for B.
template <class T, int K>
inline void execute_mma16(void* const (&operands)[kWarpSize], uint32_t) {
  float a[16][K], b[K][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto& own = *static_cast<MmaOperand*>(operands[lane]);
    for (int i = 0; i < K / 4; ++i) {
      const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
      a[row][column] = low_float(own.a[i], T{});
      a[row][column + 1] = high_float(own.a[i], T{});
    }
    for (int i = 0; i < K / 8; ++i) {
      b[2 * t + 8 * i][g] = low_float(own.b[i], T{});
      b[2 * t + 8 * i + 1][g] = high_float(own.b[i], T{});
    }
  }
  multiply(a, b, operands);
}

inline void execute_mma_tf32(void* const (&operands)[kWarpSize], uint32_t) {
  constexpr uint32_t kTf32Bits = 0xffffe000u;  // the hardware ignores the other bits
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto& own = *static_cast<MmaOperand*>(operands[lane]);
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = __uint_as_float(own.a[i] & kTf32Bits);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = __uint_as_float(own.b[i] & kTf32Bits);
  }
  multiply(a, b, operands);
}

struct LdmatrixOperand {
  uint32_t* r;
  const void* row;
};

template <int Matrices, bool Transposed>
inline void execute_ldmatrix(void* const (&operands)[kWarpSize], uint32_t) {
  for (int i = 0; i < Matrices; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* address = static_cast<LdmatrixOperand*>(operands[8 * i + row])->row;
      if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        fail("ldmatrix: the address of lane %d is not a multiple of 16 bytes", 8 * i + row);
      }
      memcpy(matrix[row], address, sizeof matrix[row]);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = Transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = Transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<LdmatrixOperand*>(operands[lane])->r[i] = high << 16 | low;
    }
  }
}

struct StmatrixOperand {
  const uint32_t* r;
  void* row;
};

template <int Matrices>
inline void execute_stmatrix(void* const (&operands)[kWarpSize], uint32_t) {
  for (int i = 0; i < Matrices; ++i) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      void* row = static_cast<StmatrixOperand*>(operands[8 * i + g])->row;
      if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
        fail("stmatrix: the address of lane %d is not a multiple of 16 bytes", 8 * i + g);
      }
      memcpy(static_cast<unsigned char*>(row) + 4 * t, &static_cast<StmatrixOperand*>(operands[lane])->r[i], 4);
    }
  }
}

struct MovmatrixOperand {
  uint32_t in, out;
};

inline void execute_movmatrix(void* const (&operands)[kWarpSize], uint32_t) {
  uint16_t matrix[8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const uint32_t in = static_cast<MovmatrixOperand*>(operands[lane])->in;
    matrix[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(in);
    matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(in >> 16);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    static_cast<MovmatrixOperand*>(operands[lane])->out = uint32_t{matrix[2 * t + 1][g]} << 16 | matrix[2 * t][g];
  }
}

template <class... Params>
struct BoundKernel {
  void (*kernel)(Params...);
  std::tuple<std::remove_cv_t<Params>...> params;
  static void run(void* self) {
    auto& bound = *static_cast<BoundKernel*>(self);
    std::apply(bound.kernel, bound.params);
  }
};

}  // namespace emulation

namespace swinkernels {
namespace ptx {

using emulation::Site;

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T,
                         Site site = Site::current()) {
  emulation::MmaOperand operand{d, a, b};
  emulation::warp_collective(
      {"mma_m16n8k16", emulation::kFullMask, true, &operand, emulation::execute_mma16<T, 16>, site});
}

template <class T>
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], T, Site site = Site::current()) {
  emulation::MmaOperand operand{d, a, b};
  emulation::warp_collective(
      {"mma_m16n8k8", emulation::kFullMask, true, &operand, emulation::execute_mma16<T, 8>, site});
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
  emulation::MmaOperand operand{d, a, b};
  emulation::warp_collective(
      {"mma_m16n8k8_tf32", emulation::kFullMask, true, &operand, emulation::execute_mma_tf32, site});
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row, Site site = Site::current()) {
  emulation::LdmatrixOperand operand{r, smem_row};
  emulation::warp_collective(
      {"ldmatrix_x4", emulation::kFullMask, true, &operand, emulation::execute_ldmatrix<4, false>, site});
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row, Site site = Site::current()) {
  emulation::LdmatrixOperand operand{r, smem_row};
  emulation::warp_collective(
      {"ldmatrix_x2", emulation::kFullMask, true, &operand, emulation::execute_ldmatrix<2, false>, site});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row, Site site = Site::current()) {
  emulation::LdmatrixOperand operand{r, smem_row};
  emulation::warp_collective(
      {"ldmatrix_x4_trans", emulation::kFullMask, true, &operand, emulation::execute_ldmatrix<4, true>, site});
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row, Site site = Site::current()) {
  emulation::LdmatrixOperand operand{r, smem_row};
  emulation::warp_collective(
      {"ldmatrix_x2_trans", emulation::kFullMask, true, &operand, emulation::execute_ldmatrix<2, true>, site});
}

constexpr bool kHasStmatrix = true;
constexpr bool kIsBlackwell = false;
inline void stmatrix_x4(void* smem_row, const uint32_t (&r)[4], Site site = Site::current()) {
  emulation::StmatrixOperand operand{r, smem_row};
  emulation::warp_collective(
      {"stmatrix_x4", emulation::kFullMask, true, &operand, emulation::execute_stmatrix<4>, site});
}
inline void stmatrix_x2(void* smem_row, const uint32_t (&r)[2], Site site = Site::current()) {
  emulation::StmatrixOperand operand{r, smem_row};
  emulation::warp_collective(
      {"stmatrix_x2", emulation::kFullMask, true, &operand, emulation::execute_stmatrix<2>, site});
}

inline uint32_t movmatrix_trans(uint32_t m, Site site = Site::current()) {
  emulation::MovmatrixOperand operand{m, 0};
  emulation::warp_collective(
      {"movmatrix_trans", emulation::kFullMask, true, &operand, emulation::execute_movmatrix, site});
  return operand.out;
}

inline void cp_async_16(void* smem, const void* gmem, bool valid, Site site = Site::current()) {
  emulation::async_copy(smem, gmem, 16, valid, site);
}
using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* smem) { return static_cast<unsigned char*>(smem); }
inline void cp_async_16(SharedAddress smem, const void* gmem, Site site = Site::current()) {
  emulation::async_copy(smem, gmem, 16, true, site);
}
inline void cp_async_4(void* smem, const void* gmem, bool valid, Site site = Site::current()) {
  emulation::async_copy(smem, gmem, 4, valid, site);
}
inline void store_global_16(void* gmem, uint4 x) { *static_cast<uint4*>(gmem) = x; }
inline void cp_async_commit() { emulation::async_commit(); }
template <int N>
inline void cp_async_wait() {
  emulation::async_wait(N);
}

inline float exp2_approx(float x) {
  constexpr float kSmallestNormal = 0x1p-126f;
  const float y = exp2f(x);
  return y < kSmallestNormal ? 0.0f : y;
}

inline float flush_denormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float reciprocal_approx(float x) { return flush_denormal(1.0f / flush_denormal(x)); }
inline float log2_approx(float x) { return log2f(flush_denormal(x)); }

inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

inline uint64_t multiply_add_wide(uint32_t a, uint32_t b, uint64_t c) { return uint64_t{a} * b + c; }

inline int opaque(int x) { return x; }
inline uint32_t opaque(uint32_t x) { return x; }
inline float opaque(float x) { return x; }

}  // namespace ptx

constexpr size_t kDefaultDynamicSmemBytes = 48 * 1024;

inline unsigned char* dynamic_smem() { return emulation::dynamic_shared_memory(); }

template <class... Params, class... Args>
inline cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_smem_bytes, cudaStream_t,
                          Args&&... args) {
  emulation::BoundKernel<Params...> bound{kernel, {static_cast<Params>(args)...}};
  const emulation::LaunchShape shape{
      reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, dynamic_smem_bytes};
  return static_cast<cudaError_t>(emulation::run_grid(shape, &bound.run, &bound));
}

inline cudaError_t multiprocessor_count(int* count) {
  *count = emulation::multiprocessors();
  return cudaSuccess;
}

inline cudaError_t shared_bytes_of_block(int* bytes) {
  *bytes = emulation::shared_bytes_of_block();
  return cudaSuccess;
}

template <class... Params>
inline cudaError_t blocks_per_multiprocessor(void (*)(Params...), int, size_t, int* blocks) {
  *blocks = 1;
  return cudaSuccess;
}

}  // namespace swinkernels
