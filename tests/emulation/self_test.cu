// Small kernels that test the emulator itself: the result of each instruction, and the detection of each mistake.
#include "kernels/common/launch.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/smem_tile.cuh"

namespace swinkernels {
namespace {

// d (16 x 8) = a (16 x K, row-major) * b (K x 8, row-major) of 16-bit elements, loaded with ldmatrix.
template <class T, int K>
__global__ void mma16_kernel(const T* a, const T* b, float* d) {
  auto a_smem = reinterpret_cast<T*>(dynamic_smem());
  T* b_smem = a_smem + 16 * K;
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * K; i += warpSize) a_smem[i] = a[i];
  for (int i = lane; i < K * 8; i += warpSize) b_smem[i] = b[i];
  __syncthreads();
  float acc[4] = {};
  if constexpr (K == 16) {
    uint32_t a_fragment[4], b_fragment[2];
    ptx::ldmatrix_x4(a_fragment, a_smem + lane % 16 * K + lane / 16 * 8);
    ptx::ldmatrix_x2_trans(b_fragment, b_smem + lane % 16 * 8);
    ptx::mma_m16n8k16(acc, a_fragment, b_fragment, T{});
  } else {
    uint32_t a_fragment[2], b_fragment[2];
    ptx::ldmatrix_x2(a_fragment, a_smem + lane % 16 * K);
    ptx::ldmatrix_x2(b_fragment, b_smem + lane % 8 * 8);
    const uint32_t b_transposed[1] = {ptx::movmatrix_trans(b_fragment[0])};
    ptx::mma_m16n8k8(acc, a_fragment, b_transposed, T{});
  }
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

// d (16 x 8) = a (16 x 8) * b (8 x 8) in TF32, loading the fragments without ldmatrix.
__global__ void mma_tf32_kernel(const float* a, const float* b, float* d, bool rounded) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t a_fragment[4], b_fragment[2];
  const auto bits = [=](float x) { return rounded ? ptx::to_tf32(x) : __float_as_uint(x); };
  for (int i = 0; i < 4; ++i) a_fragment[i] = bits(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) b_fragment[i] = bits(b[(t + i * 4) * 8 + g]);
  float acc[4] = {};
  ptx::mma_m16n8k8_tf32(acc, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = acc[i];
}

// Transposes four 8 x 8 matrices.
__global__ void transpose_kernel(const uint16_t* x, uint16_t* y) {
  auto smem = reinterpret_cast<uint16_t*>(dynamic_smem());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += warpSize) smem[i] = x[i];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, smem + lane * 8);
  for (int i = 0; i < 4; ++i) {
    y[i * 64 + lane / 4 * 8 + lane % 4 * 2] = static_cast<uint16_t>(r[i]);
    y[i * 64 + lane / 4 * 8 + lane % 4 * 2 + 1] = static_cast<uint16_t>(r[i] >> 16);
  }
}

// Writes 16 x 40 float16 values from fragments to rows 16 to 31 of a tile of 64 columns: with stmatrix, without it, or
// only to rows below row_limit.
__global__ void write_packed_kernel(const uint32_t* x, uint32_t* y, int how, int row_limit) {
  using Tile = SmemTile<__half, 64>;
  const Tile tile{reinterpret_cast<__half*>(dynamic_smem())};
  const LocatedTile<Tile> located(tile.data, LaneOffsets<Tile>::of());
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 32 * 64; i += warpSize) tile.data[i] = __half();
  __syncwarp();
  uint32_t packed[5][2];
  for (int j = 0; j < 5; ++j) {
    for (int half = 0; half < 2; ++half) packed[j][half] = x[(g + 8 * half) * 20 + 4 * j + t];
  }
  if (how == 0) write_packed<true>(tile, 16, packed);
  if (how == 1) write_packed<false>(tile, 16, packed);
  if (how == 2) write_packed<true>(located, 16, packed);
  if (how == 3) write_packed_below(located, 16, row_limit, packed);
  __syncwarp();
  for (int i = lane; i < 32 * 32; i += warpSize) {
    y[i] = *reinterpret_cast<const uint32_t*>(tile.element(i / 32, i % 32 * 2));
  }
}

// Writes one row of y per function: the sum over the warp (xor), the value of the next lane, the value of the previous
// lane within groups of 8, the value of lane 3 of each group, and the ballot of odd values.
__global__ void shuffle_kernel(const int* x, int* y) {
  const int lane = threadIdx.x;
  int sum = x[lane];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  y[lane] = sum;
  y[32 + lane] = __shfl_down_sync(0xffffffffu, x[lane], 1);
  y[64 + lane] = __shfl_up_sync(0xffffffffu, x[lane], 1, 8);
  y[96 + lane] = __shfl_sync(0xffffffffu, x[lane], 3, 8);
  y[128 + lane] = static_cast<int>(__ballot_sync(0xffffffffu, x[lane] & 1));
  if (lane < 8) y[lane] += __shfl_xor_sync(0x000000ffu, x[lane], 1);  // only part of the warp
}

// Copies `rows` rows of 256 floats from x to y in a persistent loop, with zeros for the last 4 floats of a row. Each of
// 64 threads writes the 4 floats that a thread of the other warp has fetched.
__global__ void async_kernel(const float* x, float* y, int rows, bool wait, bool barrier) {
  auto smem = reinterpret_cast<float*>(dynamic_smem());
  const int thread = threadIdx.x, neighbour = (thread + 32) % 64;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    ptx::cp_async_16(smem + thread * 4, x + row * 256 + thread * 4, thread != 63);
    ptx::cp_async_commit();
    if (wait) {
      ptx::cp_async_wait<0>();
    } else {
      ptx::cp_async_wait<1>();
    }
    if (barrier) __syncthreads();
    for (int i = 0; i < 4; ++i) y[row * 256 + neighbour * 4 + i] = smem[neighbour * 4 + i];
    if (barrier) __syncthreads();
  }
}

enum Mistake {
  kNoMistake,
  kExitedLane,
  kMixedCollectives,
  kBarrierInBranch,
  kMissedBarrier,
  kSharedOverrun,
  kSharedSlack,
  kGlobalOverrun,
  kGlobalUnderrun,
  kMisaligned,
  kMisalignedCopy,
  kArrayIndex,
  kShuffleFromOutside,
};

__global__ void mistake_kernel(float* x, int count, int mistake) {
  auto smem = reinterpret_cast<float*>(dynamic_smem());
  const int thread = threadIdx.x, lane = thread % warpSize;
  smem[thread] = x[thread];
  switch (mistake) {
    case kExitedLane:
      if (lane == 7) return;
      __syncwarp();
      break;
    case kMixedCollectives:
      if (lane < 16) {
        __syncwarp();
      } else {
        x[thread] = __shfl_sync(0xffffffffu, x[thread], 0);
      }
      break;
    case kBarrierInBranch:
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case kMissedBarrier:
      if (thread == 5) {
        __syncwarp(1u << 5 | 1u << 6);
      } else {
        __syncthreads();
      }
      break;
    case kSharedOverrun:
      smem[thread + 32] = 0.0f;
      break;
    case kSharedSlack:
      reinterpret_cast<unsigned char*>(smem)[64 * sizeof(float) + 1] = 0;
      break;
    case kGlobalOverrun:
      x[count] = 0.0f;
      break;
    case kGlobalUnderrun:
      x[0] = x[-1 - static_cast<int>(4096 / sizeof(float))];
      break;
    case kMisaligned:
      *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(x + 1);
      break;
    case kMisalignedCopy:
      ptx::cp_async_16(smem + 1, x, true);
      break;
    case kArrayIndex: {
      float local[4] = {};
      for (int i = 0; i <= count / 16; ++i) local[i] = x[i];
      x[0] = local[count % 4];
      break;
    }
    case kShuffleFromOutside:
      if (lane < 16) x[thread] = __shfl_sync(0x0000ffffu, x[thread], 20);
      break;
    default:
      __syncthreads();
  }
}

}  // namespace
}  // namespace swinkernels

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace swinkernels;

EXPORT int self_mma(int kind, const void* a, const void* b, float* d) {
  constexpr size_t kSmemBytes = 1024;
  const auto half_a = static_cast<const __half*>(a), half_b = static_cast<const __half*>(b);
  const auto bf16_a = static_cast<const __nv_bfloat16*>(a), bf16_b = static_cast<const __nv_bfloat16*>(b);
  switch (kind) {
    case 0:
      return launch(mma16_kernel<__half, 16>, 1, 32, kSmemBytes, nullptr, half_a, half_b, d);
    case 1:
      return launch(mma16_kernel<__nv_bfloat16, 16>, 1, 32, kSmemBytes, nullptr, bf16_a, bf16_b, d);
    case 2:
      return launch(mma16_kernel<__half, 8>, 1, 32, kSmemBytes, nullptr, half_a, half_b, d);
    case 3:
      return launch(mma16_kernel<__nv_bfloat16, 8>, 1, 32, kSmemBytes, nullptr, bf16_a, bf16_b, d);
    default:
      return launch(mma_tf32_kernel, 1, 32, 0, nullptr, static_cast<const float*>(a), static_cast<const float*>(b), d,
                    kind == 5);
  }
}

EXPORT int self_transpose(const uint16_t* x, uint16_t* y) {
  return launch(transpose_kernel, 1, 32, 512, nullptr, x, y);
}
EXPORT int self_write_packed(const uint32_t* x, uint32_t* y, int how, int row_limit) {
  return launch(write_packed_kernel, 1, 32, 32 * 64 * 2, nullptr, x, y, how, row_limit);
}
EXPORT int self_shuffle(const int* x, int* y) { return launch(shuffle_kernel, 1, 32, 0, nullptr, x, y); }

// Converts x to float16 and bfloat16 (low and high half of y) and back: from float16 into x, from bfloat16 into back.
EXPORT void self_convert(float* x, float* back, uint32_t* y, int64_t count, bool portable) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = portable ? portable_float_to_half(x[i]) : emulated_float_to_half(x[i]);
    const uint16_t bfloat16 = emulated_float_to_bfloat16(x[i]);
    y[i] = uint32_t{bfloat16} << 16 | half;
    x[i] = portable ? portable_half_to_float(half) : emulated_half_to_float(half);
    back[i] = emulated_bfloat16_to_float(bfloat16);
  }
}

EXPORT int self_async(const float* x, float* y, int rows, bool wait, bool barrier) {
  int blocks = 0;
  multiprocessor_count(&blocks);
  return launch(async_kernel, blocks, 64, 64 * 16, nullptr, x, y, rows, wait, barrier);
}

EXPORT int self_mistake(float* x, int count, int mistake) {
  // An odd size leaves slack up to the alignment, which can be written without a fault.
  return launch(mistake_kernel, 1, 64, 64 * sizeof(float) + (mistake == kSharedSlack ? 1 : 0), nullptr, x, count,
                mistake);
}
