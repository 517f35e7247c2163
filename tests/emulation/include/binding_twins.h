// Emulated version of csrc/bindings/current_stream.h, included before the bindings. With this header, the bindings are
// registered for CPU tensors and launch the emulated kernels; a launch error becomes an exception with the emulator's
// message.
#pragma once

#define SWINKERNELS_BINDINGS_CURRENT_STREAM_H_

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

extern "C" const char* emulation_error();

#define SWINKERNELS_CUDA_KEY CPU
#define SWINKERNELS_CUDA_CHECK(status) \
  STD_TORCH_CHECK((status) == cudaSuccess, "emulated CUDA kernel: ", emulation_error())

namespace swinkernels {

struct CurrentStream {
  cudaStream_t stream = nullptr;
  explicit CurrentStream(const torch::stable::Tensor&) {}
};

}  // namespace swinkernels
