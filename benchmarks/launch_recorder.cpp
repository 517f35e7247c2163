// Calls the launch functions of window attention without a GPU and reports each kernel launch to a callback: the
// kernel, the numbers of blocks and threads, and the parameters. It is linked with nvcc's objects of csrc/ in place of
// the CUDA runtime.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <string>

#include "params/window_attention_cuda.h"

// The arguments passed by instructions.py. Addresses refer to its simulated device memory.
struct Call {
  int64_t batch;
  int32_t size[3], window[3], shift[3];
  int32_t num_heads, head_dim, dtype;
  int32_t multiprocessors, blocks_per_multiprocessor, capability;
  float scale, mask_value;
  uint64_t qkv, out, lse, bias_table, bias, logit_scale, dout, dqkv, dbias_table, dbias, dlogit_scale, workspace;
  uint64_t axis_tables, daxis_tables;
  int32_t separate;  // q, k and v in separate maps, not interleaved
};

namespace {

using Report = void (*)(const char* kernel, const uint32_t grid[3], const uint32_t block[3], uint64_t shared_bytes,
                        void* const* arguments);

Report report;
const Call* current;
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// Returns the map that begins `offset` elements after an address, with tokens `row` elements apart.
template <class Map>
Map map_at(const Call& call, uint64_t address, int64_t offset, int64_t row) {
  Map map = {};
  if (address == 0) return map;
  map.data = at<void>(address + offset * (call.dtype == 0 ? 4 : 2));
  map.axis_stride[2] = row;
  map.axis_stride[1] = row * call.size[2];
  map.axis_stride[0] = row * call.size[2] * call.size[1];
  map.batch_stride = map.axis_stride[0] * call.size[0];
  map.head_stride = call.head_dim;
  return map;
}

template <class Map>
Map part_of_qkv(const Call& call, uint64_t address, int part) {
  const int64_t row = int64_t{call.num_heads} * call.head_dim;
  const int64_t tokens = call.batch * call.size[0] * call.size[1] * call.size[2];
  return call.separate != 0 ? map_at<Map>(call, address, part * tokens * row, row)
                            : map_at<Map>(call, address, part * row, 3 * row);
}

swinkernels::WindowAttentionForwardParams forward_params(const Call& call) {
  using namespace swinkernels;
  WindowAttentionForwardParams params = {};
  params.dtype = static_cast<DType>(call.dtype);
  params.num_heads = call.num_heads;
  params.head_dim = call.head_dim;
  params.batch = call.batch;
  for (int axis = 0; axis < 3; ++axis) {
    WindowGeometry& geometry = params.geometry;
    geometry.size[axis] = call.size[axis];
    geometry.window[axis] = geometry.table_window[axis] = call.window[axis];
    geometry.shift[axis] = call.shift[axis];
    geometry.num_windows[axis] = (call.size[axis] + call.window[axis] - 1) / call.window[axis];
    geometry.frame[axis] = geometry.num_windows[axis] * call.window[axis];
  }
  params.scale = call.scale;
  params.mask_value = call.mask_value;
  params.q = part_of_qkv<ConstTokenMap>(call, call.qkv, 0);
  params.k = part_of_qkv<ConstTokenMap>(call, call.qkv, 1);
  params.v = part_of_qkv<ConstTokenMap>(call, call.qkv, 2);
  const int64_t row = int64_t{call.num_heads} * call.head_dim;
  params.out = map_at<TokenMap>(call, call.out, 0, row);
  params.lse = at<float>(call.lse);
  params.bias_table = at<float>(call.bias_table);
  params.bias = at<float>(call.bias);
  params.bias_types = 1;
  params.logit_scale = at<float>(call.logit_scale);
  params.axis_tables = at<float>(call.axis_tables);
  for (int axis = 1; axis < 3 && call.axis_tables != 0; ++axis) params.axis_rows[axis] = 2 * call.window[axis] - 1;
  return params;
}

swinkernels::WindowAttentionBackwardParams backward_params(const Call& call) {
  using namespace swinkernels;
  WindowAttentionBackwardParams params = {};
  params.forward = forward_params(call);
  params.dout = map_at<ConstTokenMap>(call, call.dout, 0, int64_t{call.num_heads} * call.head_dim);
  params.dq = part_of_qkv<TokenMap>(call, call.dqkv, 0);
  params.dk = part_of_qkv<TokenMap>(call, call.dqkv, 1);
  params.dv = part_of_qkv<TokenMap>(call, call.dqkv, 2);
  params.dbias_table = at<float>(call.dbias_table);
  params.dbias = at<float>(call.dbias);
  params.dlogit_scale = at<float>(call.dlogit_scale);
  params.daxis_tables = at<float>(call.daxis_tables);
  params.workspace = at<void>(call.workspace);
  return params;
}

}  // namespace

extern "C" {

// Runs one call and returns the status of its launch function.
int record_forward(const Call* call, Report to) {
  report = to;
  current = call;
  return swinkernels::cuda::window_attention_forward(forward_params(*call), nullptr);
}

int record_backward(const Call* call, Report to) {
  report = to;
  current = call;
  return swinkernels::cuda::window_attention_backward(backward_params(*call), nullptr);
}

int64_t workspace_bytes(const Call* call) {
  current = call;
  return swinkernels::cuda::window_attention_backward_workspace_bytes(backward_params(*call));
}

// Stand-ins for the functions of the CUDA runtime that the object files call.

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  kernels()[host_function] = name;
}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const uint32_t grid[3] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  const uint32_t block[3] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  report(kernels()[function].c_str(), grid, block, config->dynamicSmemBytes, arguments);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelExC(&config, function, arguments);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = current->multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = current->capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = current->capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 * 1024;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = current->blocks_per_multiprocessor;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = current->blocks_per_multiprocessor;
  return cudaSuccess;
}
}
