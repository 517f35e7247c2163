// Defines the dispatch key under which the CUDA bindings register ops, and the stream on which they launch kernels.
//
// The include guard is a macro instead of #pragma once, because tests/emulation replaces this file with its own
// version, in which the bindings run emulated kernels on CPU tensors. Bindings must therefore use no dispatch key,
// stream or device check other than those defined here.
#ifndef SWINKERNELS_BINDINGS_CURRENT_STREAM_H_
#define SWINKERNELS_BINDINGS_CURRENT_STREAM_H_

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#define SWINKERNELS_CUDA_KEY CUDA
#define SWINKERNELS_CUDA_CHECK STD_CUDA_CHECK

namespace swinkernels {

// Makes the device of x the current device, and gives access to the current stream of that device.
struct CurrentStream {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  explicit CurrentStream(const torch::stable::Tensor& x) : guard(x.get_device_index()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
};

}  // namespace swinkernels

#endif  // SWINKERNELS_BINDINGS_CURRENT_STREAM_H_
