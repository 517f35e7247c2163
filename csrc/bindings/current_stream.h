// The dispatch key under which the CUDA bindings register ops, and the stream on which they launch kernels.
//
// The guard is a macro and not #pragma once because tests/emulation has a twin of this file, with which the bindings
// run the emulated kernels on CPU tensors. Bindings therefore use the dispatch key, the stream and the check of this
// file, and no others.
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

// Makes the device of x the current one, and holds its current stream.
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
