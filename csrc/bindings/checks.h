// Functions that the bindings of all ops share, mainly to bring tensors into a form that the kernels can read. Includes
// current_stream.h in builds with CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "params/dtype.h"
#ifdef SWINKERNELS_WITH_CUDA
#include "current_stream.h"
#endif

namespace swinkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "swinkernels: a map must be float32, float16 or bfloat16");
  }
}

// Returns the address of x's elements. Sharding and offloading free the memory of a parameter that is not in use, but the
// tensor keeps its shape and its offset in the memory; then this function raises an error.
inline const void* data_of(const Tensor& x) {
  const void* data = x.const_data_ptr();
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(x.get(), &offset));
  const bool has_memory = reinterpret_cast<uintptr_t>(data) != offset * static_cast<uintptr_t>(x.element_size());
  STD_TORCH_CHECK(has_memory || x.numel() == 0, "swinkernels: the memory of a tensor of ", x.numel(),
                  " elements has been freed, for example by sharding or offloading: load it before the call");
  return data;
}

// Returns x itself if it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& x) {
  data_of(x);  // torch would read freed memory
  return torch::stable::contiguous(x);
}

#ifndef SWINKERNELS_WITHOUT_CPU
// Calls body(context, begin, end) on torch's threads for ranges that together cover [0, tasks).
inline void parallel_for(int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
#endif

inline bool is_readable(const Tensor& x, int64_t alignment) {
  const int64_t item = static_cast<int64_t>(x.element_size()), last = x.dim() - 1;
  if (x.size(last) != 1 && x.stride(last) != 1) return false;
  if (reinterpret_cast<uintptr_t>(data_of(x)) % alignment != 0) return false;
  for (int64_t i = 0; i < last; ++i) {
    if (x.size(i) != 1 && x.stride(i) * item % alignment != 0) return false;
  }
  return true;
}

// Returns x itself if the kernels can read it in place, else a copy.
inline Tensor readable(const Tensor& x, int64_t alignment) {
  if (is_readable(x, alignment)) return x;
  Tensor copy = as_contiguous(x);
  return is_readable(copy, alignment) ? copy : torch::stable::clone(copy);  // x was contiguous, but not aligned
}

// Returns x (B, *S, ...) itself if the tokens of an image are evenly spaced in memory, in row-major order, else a copy.
// S has `rank` axes.
inline Tensor with_regular_tokens(const Tensor& x, int64_t rank) {
  int64_t expected = -1;
  for (int64_t axis = rank; axis > 0; --axis) {
    if (x.size(axis) == 1) continue;  // the stride of an axis with one token is never used
    if (expected >= 0 && x.stride(axis) != expected) return as_contiguous(x);
    expected = x.stride(axis) * x.size(axis);
  }
  return x;
}

// Returns x itself if it is contiguous and its address is a multiple of `alignment` bytes, else a copy.
inline Tensor packed(const Tensor& x, int64_t alignment) {
  if (!x.is_contiguous()) return as_contiguous(x);
  return reinterpret_cast<uintptr_t>(data_of(x)) % alignment == 0 ? x : torch::stable::clone(x);
}

// Equivalent to torch::stable::new_empty, but takes less than half the time, because the op is not looked up by name.
inline Tensor new_empty(const Tensor& x, const std::vector<int64_t>& shape, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device = 0, layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(x.get(), shape.data(), static_cast<int64_t>(shape.size()), &dtype,
                                                   &layout, &device, x.get_device_index(), nullptr, &made));
  return Tensor(made);
}
inline Tensor new_empty(const Tensor& x, const std::vector<int64_t>& shape) {
  return new_empty(x, shape, x.scalar_type());
}

// Returns the first `count` sizes of x.
inline std::vector<int64_t> sizes(const Tensor& x, int64_t count) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < count; ++i) shape.push_back(x.size(i));
  return shape;
}

}  // namespace swinkernels
