// Conversions between float and the element types of the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace swinkernels {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Returns two neighbouring elements rounded to 16 bits each, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float first, float second);

template <>
__device__ __forceinline__ uint32_t pack2<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// The inverse of pack2.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t bits);

template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof(pair));
  return __half22float2(pair);
}

template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// Writes two neighbouring elements with one instruction.
template <class T>
__device__ __forceinline__ void store2(T* destination, float first, float second) {
  *reinterpret_cast<uint32_t*>(destination) = pack2<T>(first, second);
}

template <>
__device__ __forceinline__ void store2<float>(float* destination, float first, float second) {
  *reinterpret_cast<float2*>(destination) = make_float2(first, second);
}

// The inverse of store2.
template <class T>
__device__ __forceinline__ float2 load2(const T* source) {
  return unpack2<T>(*reinterpret_cast<const uint32_t*>(source));
}

template <>
__device__ __forceinline__ float2 load2<float>(const float* source) {
  return *reinterpret_cast<const float2*>(source);
}

}  // namespace swinkernels
