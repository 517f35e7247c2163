// Launches the copy between map and windows: chooses the width of the vectors, and splits large copies into several
// launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../../params/window_partition_cuda.h"
#include "window_copy.cuh"

namespace swinkernels::cuda {

// The maximum number of vectors in one launch, chosen so that the index of a vector plus the number of vectors of a
// block fits in 31 bits.
constexpr int64_t kMaxLaunchVectors = int64_t{1} << 30;

inline bool is_meaningful(const FrameGeometry& geometry) {
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t size = geometry.size[axis], window = geometry.window[axis], frame = geometry.frame[axis];
    if (size < 1 || window < 1 || frame > kMaxFrame || frame != window * geometry.num_windows[axis]) return false;
    if (geometry.shift[axis] < 0 || geometry.shift[axis] >= frame) return false;
    if (geometry.pad_before[axis] < 0 || geometry.pad_before[axis] > frame - size) return false;
  }
  return true;
}

// Returns the size in bytes, 16 at most, of the widest vector to which all rows are aligned: their length, the strides
// between them and both pointers are multiples of it.
template <class Map, class Windows>
int64_t vector_bytes(const WindowCopyParams<Map, Windows>& params) {
  const FrameGeometry& geometry = params.geometry;
  bool many_windows = params.batch > 1, many_tokens = false;
  int64_t elements = params.channels;
  for (int axis = 0; axis < 3; ++axis) {
    many_windows |= geometry.num_windows[axis] > 1;
    many_tokens |= geometry.window[axis] > 1;
    if (geometry.size[axis] > 1) elements |= params.map.axis_stride[axis];
  }
  if (params.batch > 1) elements |= params.map.batch_stride;
  if (many_windows) elements |= params.windows.window_stride;
  if (many_tokens) elements |= params.windows.token_stride;
  // The lowest set bit of a bitwise or is the largest power of two that divides all its operands.
  const int64_t bytes = 16 | (elements & -elements) * params.element_bytes |
                        reinterpret_cast<intptr_t>(params.map.data) | reinterpret_cast<intptr_t>(params.windows.data);
  return bytes & -bytes;
}

// Divides the windows into boxes, one per launch. A box has as many whole images as fit into a launch; if not even one
// fits, as many whole slabs of windows of one image, else as many whole rows of windows, else as many windows. So the
// windows of a box are contiguous.
struct WindowBoxes {
  int64_t extent[4];   // images, and windows per axis
  int64_t largest[4];  // extent of the largest box

  static WindowBoxes of(int64_t batch, const int32_t (&num_windows)[3], int64_t windows_per_launch) {
    WindowBoxes boxes = {{batch, num_windows[0], num_windows[1], num_windows[2]}, {}};
    for (int axis = 3; axis >= 0; --axis) {
      boxes.largest[axis] = std::clamp<int64_t>(windows_per_launch, 1, boxes.extent[axis]);
      windows_per_launch /= boxes.extent[axis];
    }
    return boxes;
  }
  // Finds the box that starts at `window`, which is 0 or the end of the previous box. Returns false past the last
  // window.
  bool at(int64_t window, int64_t (&first)[4], int32_t (&count)[4]) const {
    for (int axis = 3; axis >= 0; --axis) {
      first[axis] = axis > 0 ? window % extent[axis] : window;
      count[axis] = static_cast<int32_t>(std::min(largest[axis], extent[axis] - first[axis]));
      window /= extent[axis];
    }
    return first[0] < extent[0];
  }
};

template <class Vector, class Map, class Windows>
cudaError_t launch_vectors(const WindowCopyParams<Map, Windows>& params, cudaStream_t stream, int64_t max_vectors) {
  using Tile = WindowCopyTile;
  const FrameGeometry& geometry = params.geometry;
  const int64_t element = params.element_bytes, vectors = params.channels * element / sizeof(Vector);
  int64_t num_tokens = 1;
  for (const int32_t window : geometry.window) {
    num_tokens *= window;
    if (num_tokens > max_vectors) return cudaErrorInvalidValue;
  }
  if (vectors > max_vectors / num_tokens) return cudaErrorInvalidValue;

  WindowCopyArguments args = {};
  args.to_windows = std::is_same_v<Map, const void*>;
  args.frame = FrameLayout::of(geometry);
  args.tokens = RowMajorDivisor::of(geometry.window);
  args.vectors = FastDivisor::of(static_cast<uint32_t>(vectors));
  args.map = MapStrides::of(params.map, element);
  args.window_stride = params.windows.window_stride * element;
  args.token_stride = params.windows.token_stride * element;
  const size_t smem_bytes = ((Tile::kVectors + vectors - 2) / vectors + 1) * sizeof(RowCopy);

  const WindowBoxes boxes = WindowBoxes::of(params.batch, geometry.num_windows, max_vectors / (num_tokens * vectors));
  int64_t first[4], window = 0;
  int32_t count[4];
  while (boxes.at(window, first, count)) {
    const auto map = static_cast<const char*>(params.map.data) + first[0] * params.map.batch_stride * element;
    const auto windows =
        static_cast<const char*>(params.windows.data) + window * params.windows.window_stride * element;
    args.source = args.to_windows ? map : windows;
    args.destination = const_cast<char*>(args.to_windows ? windows : map);
    for (int axis = 0; axis < 3; ++axis) args.first_window[axis] = static_cast<uint32_t>(first[axis + 1]);
    args.windows = RowMajorDivisor::of({count[1], count[2], count[3]});
    const int64_t num_windows = int64_t{1} * count[0] * count[1] * count[2] * count[3];
    args.num_rows = static_cast<uint32_t>(num_windows * num_tokens);
    const int64_t blocks = (args.num_rows * vectors + Tile::kVectors - 1) / Tile::kVectors;
    const cudaError_t status = launch(window_copy_kernel<Vector>, dim3(static_cast<unsigned>(blocks)),
                                      dim3(Tile::kThreads), smem_bytes, stream, args);
    if (status != cudaSuccess) return status;
    window += num_windows;
  }
  return cudaSuccess;
}

template <class Map, class Windows>
cudaError_t launch_window_copy(const WindowCopyParams<Map, Windows>& params, cudaStream_t stream,
                               int64_t max_vectors = kMaxLaunchVectors) {
  if (!is_meaningful(params.geometry) || params.element_bytes < 1 || params.channels < 0 || params.batch < 0) {
    return cudaErrorInvalidValue;
  }
  if (params.batch == 0 || params.channels == 0) return cudaSuccess;
  switch (vector_bytes(params)) {
    case 16:
      return launch_vectors<uint4>(params, stream, max_vectors);
    case 8:
      return launch_vectors<uint2>(params, stream, max_vectors);
    case 4:
      return launch_vectors<uint32_t>(params, stream, max_vectors);
    case 2:
      return launch_vectors<uint16_t>(params, stream, max_vectors);
    default:
      return launch_vectors<uint8_t>(params, stream, max_vectors);
  }
}

}  // namespace swinkernels::cuda
