// Emulated version of the CUDA toolkit's cuda_runtime.h: keywords, built-in variables, intrinsics and collectives.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "simt.h"

#define __CUDA_ARCH__ 800
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // one block runs at a time
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = emulation::kWarpSize;

// Integer and bit intrinsics.
template <class To, class From>
inline To emulated_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return emulated_bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bit_cast<float>(x); }
inline float __int_as_float(int x) { return emulated_bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>((int64_t{a} * b) >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (pick & 7) & 0xff);
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

template <class T>
constexpr T emulated_min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T emulated_max(T a, T b) {
  return a < b ? b : a;
}
#define EMULATED_MIN_MAX(type)                                            \
  constexpr type min(type a, type b) { return emulated_min<type>(a, b); } \
  constexpr type max(type a, type b) { return emulated_max<type>(a, b); }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
#undef EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// Floating-point functions. Functions that are approximate on a GPU are exact here.
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// Memory.
#define EMULATED_LOAD(name)   \
  template <class T>          \
  inline T name(const T* p) { \
    return *p;                \
  }
EMULATED_LOAD(__ldg)
EMULATED_LOAD(__ldcs)
EMULATED_LOAD(__ldcg)
EMULATED_LOAD(__ldca)
EMULATED_LOAD(__ldlu)
#undef EMULATED_LOAD
#define EMULATED_STORE(name)        \
  template <class T>                \
  inline void name(T* p, T value) { \
    *p = value;                     \
  }
EMULATED_STORE(__stcs)
EMULATED_STORE(__stcg)
EMULATED_STORE(__stwb)
EMULATED_STORE(__stwt)
#undef EMULATED_STORE

template <class T>
inline T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
inline T atomicMax(T* p, T value) {
  const T old = *p;
  *p = old < value ? value : old;
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { __builtin_trap(); }

// Collectives.
inline void __syncthreads(emulation::Site site = emulation::Site::current()) {
  emulation::block_barrier(emulation::BlockVote::kNone, false, site);
}
inline int __syncthreads_or(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(emulation::BlockVote::kOr, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(emulation::BlockVote::kAnd, predicate != 0, site);
}
inline int __syncthreads_count(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(emulation::BlockVote::kCount, predicate != 0, site);
}

inline void __syncwarp(unsigned mask = emulation::kFullMask, emulation::Site site = emulation::Site::current()) {
  const auto execute = [](void* const(&)[emulation::kWarpSize], uint32_t) {};
  emulation::warp_collective({"__syncwarp", mask, false, nullptr, execute, site});
}
inline unsigned __activemask() { return emulation::active_mask(); }

namespace emulation {

template <class T>
struct ShuffleOperand {
  T value;
  int source;  // lane to read; the reading lane itself if the shuffle leaves its segment
  T result;
};

template <class T>
inline T shuffle(const char* name, uint32_t mask, T value, int source, const Site& site) {
  ShuffleOperand<T> operand{value, source, value};
  const auto execute = [](void* const(&operands)[kWarpSize], uint32_t participants) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(participants >> lane & 1)) continue;
      auto& own = *static_cast<ShuffleOperand<T>*>(operands[lane]);
      if (!(participants >> own.source & 1))
        fail("shuffle of lane %d reads lane %d, which takes no part", lane, own.source);
      own.result = static_cast<ShuffleOperand<T>*>(operands[own.source])->value;
    }
  };
  warp_collective({name, mask, false, &operand, execute, site});
  return operand.result;
}

struct VoteOperand {
  bool predicate;
  uint32_t ballot;
};

inline uint32_t vote(const char* name, uint32_t mask, bool predicate, const Site& site) {
  VoteOperand operand{predicate, 0};
  const auto execute = [](void* const(&operands)[kWarpSize], uint32_t participants) {
    uint32_t ballot = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (participants >> lane & 1) ballot |= uint32_t{static_cast<VoteOperand*>(operands[lane])->predicate} << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (participants >> lane & 1) static_cast<VoteOperand*>(operands[lane])->ballot = ballot;
    }
  };
  warp_collective({name, mask, false, &operand, execute, site});
  return operand.ballot;
}

}  // namespace emulation

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                     emulation::Site site = emulation::Site::current()) {
  const int lane = emulation::lane_index();
  return emulation::shuffle("__shfl_sync", mask, value, (lane & -width) + (source & (width - 1)), site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                         emulation::Site site = emulation::Site::current()) {
  const int lane = emulation::lane_index(), source = lane ^ lane_mask;
  // Lanes of an earlier segment can be read, but lanes of a later segment cannot.
  return emulation::shuffle("__shfl_xor_sync", mask, value, source < (lane & -width) + width ? source : lane, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          emulation::Site site = emulation::Site::current()) {
  const int lane = emulation::lane_index(), source = lane + static_cast<int>(delta);
  return emulation::shuffle("__shfl_down_sync", mask, value, source < (lane & -width) + width ? source : lane, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        emulation::Site site = emulation::Site::current()) {
  const int lane = emulation::lane_index(), source = lane - static_cast<int>(delta);
  return emulation::shuffle("__shfl_up_sync", mask, value, source >= (lane & -width) ? source : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::vote("__all_sync", mask, predicate != 0, site) == mask;
}
