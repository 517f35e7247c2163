// Python interface to the launch functions of csrc/params/window_attention_cuda.h, run by the emulator.
#include "params/window_attention_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace swinkernels;

EXPORT int64_t sizeof_forward_params() { return sizeof(WindowAttentionForwardParams); }
EXPORT int64_t sizeof_backward_params() { return sizeof(WindowAttentionBackwardParams); }

EXPORT int emulated_forward(const WindowAttentionForwardParams* params) {
  return cuda::window_attention_forward(*params, nullptr);
}
EXPORT int64_t emulated_backward_workspace_bytes(const WindowAttentionBackwardParams* params) {
  return cuda::window_attention_backward_workspace_bytes(*params);
}
EXPORT int emulated_backward(const WindowAttentionBackwardParams* params) {
  return cuda::window_attention_backward(*params, nullptr);
}
