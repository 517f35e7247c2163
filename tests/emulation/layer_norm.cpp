// Python interface to the launch functions of csrc/params/layer_norm_cuda.h, run by the emulator.
#include "params/layer_norm_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace swinkernels;

EXPORT int64_t sizeof_layer_norm_forward_params() { return sizeof(LayerNormForwardParams); }
EXPORT int64_t sizeof_layer_norm_backward_params() { return sizeof(LayerNormBackwardParams); }
EXPORT int32_t layer_norm_max_row() { return cuda::kMaxRow; }

EXPORT int emulated_layer_norm_forward(const LayerNormForwardParams* params) {
  return cuda::layer_norm_forward(*params, nullptr);
}
EXPORT int64_t emulated_layer_norm_backward_workspace_bytes(const LayerNormBackwardParams* params) {
  return cuda::layer_norm_backward_workspace_bytes(*params);
}
EXPORT int emulated_layer_norm_backward(const LayerNormBackwardParams* params) {
  return cuda::layer_norm_backward(*params, nullptr);
}
