// The bindings of window_partition and window_reverse, on torch's stable ABI: they set the params, allocate the
// outputs and launch the kernels. swinkernels/ops checks the arguments; the checks here guard the kernels' assumptions.
#ifdef SWINKERNELS_WITH_CUDA
#include "params/window_partition.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "build_facts.h"  // SWINKERNELS_NAMESPACE
#include "checks.h"
#include "geometry.h"
#include "params/window_partition_cuda.h"

namespace swinkernels {
namespace {

constexpr int64_t kAlignment = 1;  // the kernels choose the vector width to suit the rows' alignment

// Sets element_bytes, channels and geometry; x is the map or the windows.
template <class Params>
Params make_params(const Tensor& x, const Ints& size, const Ints& window_size, const Ints& shift_size,
                   bool roll_then_pad) {
  Params p{};
  p.element_bytes = static_cast<int32_t>(x.element_size());
  p.channels = x.size(x.dim() - 1);
  p.geometry = frame_geometry(size, window_size, shift_size, {0, 0, 0}, roll_then_pad);
  return p;
}

Tensor window_partition(Tensor x, Ints window_size, Ints shift_size, bool roll_then_pad) {
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5, "swinkernels: a map has the shape (B, *S, C)");
  const CurrentStream current(x);
  const int64_t rank = x.dim() - 2;
  const std::vector<int64_t> shape = sizes(x, 1 + rank);
  auto p =
      make_params<WindowPartitionParams>(x, {shape.begin() + 1, shape.end()}, window_size, shift_size, roll_then_pad);
  p.batch = x.size(0);
  const int64_t num_tokens = product(p.geometry.window);
  Tensor windows = torch::stable::new_empty(x, {p.batch * product(p.geometry.num_windows), num_tokens, p.channels});
  if (windows.numel() == 0) return windows;
  x = readable(x, kAlignment);
  p.map = feature_map(x, data_of(x), rank);
  p.windows = {windows.mutable_data_ptr(), num_tokens * p.channels, p.channels};
  SWINKERNELS_CUDA_CHECK(cuda::window_partition(p, current.stream));
  return windows;
}

Tensor window_reverse(Tensor windows, Ints size, Ints window_size, Ints shift_size, bool roll_then_pad) {
  STD_TORCH_CHECK(windows.dim() == 3, "swinkernels: windows have the shape (B * num_windows, N, C)");
  const CurrentStream current(windows);
  auto p = make_params<WindowReverseParams>(windows, size, window_size, shift_size, roll_then_pad);
  const int64_t num_windows = product(p.geometry.num_windows);
  STD_TORCH_CHECK(windows.size(0) % num_windows == 0 && windows.size(1) == product(p.geometry.window),
                  "swinkernels: windows must be (B * ", num_windows, ", ", product(p.geometry.window), ", C)");
  p.batch = windows.size(0) / num_windows;
  std::vector<int64_t> shape{p.batch};
  shape.insert(shape.end(), size.begin(), size.end());
  shape.push_back(p.channels);
  Tensor map = torch::stable::new_empty(windows, shape);
  if (map.numel() == 0) return map;
  windows = readable(windows, kAlignment);
  p.map = feature_map(map, map.mutable_data_ptr(), static_cast<int64_t>(size.size()));
  p.windows = {data_of(windows), windows.stride(0), windows.stride(1)};
  SWINKERNELS_CUDA_CHECK(cuda::window_reverse(p, current.stream));
  return map;
}

STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, SWINKERNELS_CUDA_KEY, m) {
  m.impl("window_partition", TORCH_BOX(&window_partition));
  m.impl("window_reverse", TORCH_BOX(&window_reverse));
}

}  // namespace
}  // namespace swinkernels
#endif
