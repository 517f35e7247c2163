// Functions that launch kernels, give access to dynamic shared memory and query device attributes.
//
// None of these functions synchronises, and all may be called while a stream is captured.
//
// The include guard is a macro instead of #pragma once, because tests/emulation replaces this file with its own
// version, which runs launches on the CPU. Therefore, kernels must be launched with launch(), and must access dynamic
// shared memory with dynamic_smem().
#ifndef SWINKERNELS_KERNELS_COMMON_LAUNCH_CUH_
#define SWINKERNELS_KERNELS_COMMON_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>

namespace swinkernels {

// The number of bytes of dynamic shared memory that a kernel may use without opting in.
constexpr size_t kDefaultDynamicSmemBytes = 48 * 1024;

// Returns the block's dynamic shared memory, which is 128-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char swinkernels_dynamic_smem[];
  return swinkernels_dynamic_smem;
}

template <class... Params>
inline cudaError_t allow_dynamic_smem(void (*kernel)(Params...), size_t bytes) {
  if (bytes <= kDefaultDynamicSmemBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Runs kernel<<<grid, block, dynamic_smem_bytes, stream>>>(args...) and returns its status. A launch error is returned
// and cleared, so the next caller of cudaGetLastError does not see it; an error left by another library is not
// returned.
template <class... Params, class... Args>
inline cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_smem_bytes,
                          cudaStream_t stream, Args&&... args) {
  cudaError_t status = allow_dynamic_smem(kernel, dynamic_smem_bytes);
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = dynamic_smem_bytes;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  }
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// Stores an attribute of the current device. The attribute is cached, so later calls only call cudaGetDevice.
template <cudaDeviceAttr kAttribute>
inline cudaError_t device_attribute(int* value) {
  constexpr int kCachedDevices = 64;
  static std::atomic<int> cache[kCachedDevices];
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  *value = device < kCachedDevices ? cache[device].load(std::memory_order_relaxed) : 0;
  if (*value != 0) return cudaSuccess;
  status = cudaDeviceGetAttribute(value, kAttribute, device);
  if (status == cudaSuccess && device < kCachedDevices) cache[device].store(*value, std::memory_order_relaxed);
  return status;
}

inline cudaError_t multiprocessor_count(int* count) { return device_attribute<cudaDevAttrMultiProcessorCount>(count); }

// Stores the number of bytes of shared memory that a block may use.
inline cudaError_t shared_bytes_of_block(int* bytes) {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(bytes);
}

// Stores the number of a kernel's blocks that fit on a multiprocessor of the current device, at least 1 if the kernel
// can run.
template <class... Params>
inline cudaError_t blocks_per_multiprocessor(void (*kernel)(Params...), int threads, size_t dynamic_smem_bytes,
                                             int* blocks) {
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  // The cache is per thread, which avoids a lock, and has one entry per kernel and configuration.
  thread_local std::map<std::tuple<int, void (*)(Params...), int, size_t>, int> cache;
  const auto key = std::make_tuple(device, kernel, threads, dynamic_smem_bytes);
  const auto found = cache.find(key);
  if (found != cache.end()) {
    *blocks = found->second;
    return cudaSuccess;
  }
  status = allow_dynamic_smem(kernel, dynamic_smem_bytes);
  if (status == cudaSuccess && dynamic_smem_bytes > 0) {
    // The number of blocks is valid only if the driver assigns as much memory as possible to shared memory instead of
    // the L1 cache; this attribute makes it do so.
    status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, dynamic_smem_bytes);
  }
  if (status == cudaSuccess) cache.emplace(key, *blocks);
  return status;
}

}  // namespace swinkernels

#endif  // SWINKERNELS_KERNELS_COMMON_LAUNCH_CUH_
