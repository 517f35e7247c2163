// Emulated version of the CUDA toolkit's cuda_runtime_api.h: the types and host functions that the kernels use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

#define EMULATED_VECTOR(name, type, bytes)                                    \
  struct alignas(sizeof(type)) name##1 { type x; };                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                    \
  struct name##3 { type x, y, z; };                                           \
  struct alignas(bytes) name##4 { type x, y, z, w; };                         \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR(char, signed char, 4)
EMULATED_VECTOR(uchar, unsigned char, 4)
EMULATED_VECTOR(short, short, 8)
EMULATED_VECTOR(ushort, unsigned short, 8)
EMULATED_VECTOR(int, int, 16)
EMULATED_VECTOR(uint, unsigned, 16)
EMULATED_VECTOR(float, float, 16)
EMULATED_VECTOR(longlong, long long, 16)
EMULATED_VECTOR(double, double, 16)
#undef EMULATED_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "error of an emulated launch"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t = nullptr) {
  memset(data, value, bytes);
  return cudaSuccess;
}
