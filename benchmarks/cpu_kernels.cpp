// Calls the CPU kernels without torch, so that valgrind's callgrind can count their instructions. Each command-line
// argument describes one call: the fields of Call or of LinearCall, separated by commas. Each call is made twice, the
// second time between measured_begin and measured_end; callgrind resets its counts at the former and writes them at the
// latter (see cpu_instructions.py).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "params/attention_half_cpu.h"
#include "params/linear_cpu.h"
#include "params/window_attention_cpu.h"

extern "C" {
__attribute__((noinline)) void measured_begin() { asm volatile(""); }
__attribute__((noinline)) void measured_end() { asm volatile(""); }
}

namespace swinkernels {
namespace {

enum Bias { kNoBias, kTable, kDense };

enum Pass { kForward, kBackward, kLinear, kHalf };

// Window attention or, for the pass kHalf, a block's attention half, in v2's form if `cosine`.
struct Call {
  int32_t pass, dtype, batch, size[3], window[3], shift[3], heads, head_dim, bias, cosine;
};

// A Linear layer or, with hidden channels, an MLP, each with a residual connection; activation is a cpu::Activation.
struct LinearCall {
  int32_t pass, rows, in_features, hidden, out_features, activation;
};

// Generates pseudo-random numbers in [-1, 1), the same in every run.
class Numbers {
 public:
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }
  std::vector<float> floats(int64_t count) {
    std::vector<float> all(static_cast<std::size_t>(count));
    for (float& x : all) x = next();
    return all;
  }
  // Returns the bytes of `count` random elements.
  std::vector<char> elements(DType dtype, int64_t count) {
    const std::size_t item = dtype == DType::kFloat32 ? 4 : 2;
    std::vector<char> all(static_cast<std::size_t>(count) * item);
    for (int64_t i = 0; i < count; ++i) {
      const float x = next();
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (dtype == DType::kBFloat16) bits >>= 16;
      if (dtype == DType::kFloat16) bits = (bits >> 16 & 0x8000) | 0x3800 | (bits >> 13 & 0x3ff);  // in [0.5, 1)
      std::memcpy(all.data() + static_cast<std::size_t>(i) * item, &bits, item);
    }
    return all;
  }

 private:
  uint64_t state_ = 1;
};

int64_t product(const int32_t (&v)[3]) { return int64_t{1} * v[0] * v[1] * v[2]; }

// Returns the map that begins at `data`, with tokens in image order, `width` elements apart.
template <class Map, class Data>
Map map_of(const Call& call, Data* data, int64_t width) {
  Map map{};
  map.data = data;
  int64_t stride = width;
  for (int i = 2; i >= 0; --i) {
    map.axis_stride[i] = stride;
    stride *= call.size[i];
  }
  map.batch_stride = stride;
  map.head_stride = call.head_dim;
  return map;
}

void one_thread(int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) { body(context, 0, tasks); }

template <class MakeCall>
void measure(MakeCall make_call) {
  make_call();  // the first call may allocate memory
  measured_begin();
  make_call();
  measured_end();
}

void run(const LinearCall& call) {
  Numbers numbers;
  const int64_t rows = call.rows, in = call.in_features, hidden = call.hidden, out = call.out_features;
  const auto activation = static_cast<cpu::Activation>(call.activation);
  const std::vector<float> x = numbers.floats(rows * in), residual = numbers.floats(rows * out);
  const std::vector<float> first = numbers.floats((hidden > 0 ? hidden : out) * in),
                           second = numbers.floats(out * hidden);
  const std::vector<float> bias = numbers.floats(hidden + out);
  std::vector<float> y(residual.size());
  if (hidden == 0) {
    const cpu::LinearLayer<float> layer{first.data(), bias.data(), in, out, in};
    const cpu::LinearParams<float> p{x.data(), residual.data(), y.data(), rows, in, {}, {}, layer, activation};
    return measure([&] { cpu::linear_forward(p, one_thread); });
  }
  const cpu::LinearLayer<float> fc1{first.data(), bias.data(), in, hidden, in},
      fc2{second.data(), bias.data(), hidden, out, hidden};
  const cpu::MlpParams<float> p{x.data(), residual.data(), y.data(), rows, in, {}, {}, fc1, fc2, activation, false, 1};
  measure([&] { cpu::mlp_forward(p, one_thread); });
}

// Runs the attention half of a block whose window attention has these params, except the maps.
void run_half(const Call& call, const WindowAttentionForwardParams& attention, Numbers& numbers) {
  const int64_t width = int64_t{1} * call.heads * call.head_dim, tokens = call.batch * product(call.size);
  const std::vector<float> x = numbers.floats(tokens * width), weights = numbers.floats(4 * width * width),
                           biases = numbers.floats(6 * width);
  std::vector<float> out(x.size());
  cpu::AttentionHalfParams<float> p{};
  p.attention = attention;
  p.x = map_of<ConstTokenMap>(call, x.data(), width);
  p.out = map_of<TokenMap>(call, out.data(), width);
  p.channels = width;
  p.residual = true;
  p.threads = 1;
  (call.cosine != 0 ? p.post_norm : p.norm) = {true, biases.data() + 4 * width, biases.data() + 5 * width, 1e-5f};
  for (int64_t i = 0; i < 4; ++i) {
    const float *weight = weights.data() + i * width * width, *bias = biases.data() + i * width;
    (i < 3 ? p.qkv[i] : p.proj) = {weight, bias, width, width, width};
  }
  measure([&] { cpu::attention_half_forward(p, one_thread); });
}

void run(const Call& call) {
  WindowAttentionBackwardParams params{};
  WindowAttentionForwardParams& p = params.forward;
  p.dtype = static_cast<DType>(call.dtype);
  p.num_heads = call.heads;
  p.head_dim = call.head_dim;
  p.batch = call.batch;
  p.scale = 0.25f;
  p.mask_value = -100.0f;
  p.bias_types = 1;
  WindowGeometry& g = p.geometry;
  int64_t table_rows = 1;
  for (int i = 0; i < 3; ++i) {
    g.size[i] = call.size[i];
    g.window[i] = g.table_window[i] = call.window[i];
    g.shift[i] = call.shift[i];
    g.num_windows[i] = (call.size[i] + call.window[i] - 1) / call.window[i];
    g.frame[i] = g.num_windows[i] * call.window[i];
    table_rows *= 2 * call.window[i] - 1;
  }
  const int64_t tokens = call.batch * product(g.size), width = int64_t{1} * call.heads * call.head_dim;
  const int64_t n = product(g.window), item = p.dtype == DType::kFloat32 ? 4 : 2;

  Numbers numbers;
  const std::vector<char> qkv = numbers.elements(p.dtype, tokens * 3 * width);
  const std::vector<char> dout = numbers.elements(p.dtype, tokens * width);
  std::vector<char> out(dout.size()), dqkv(qkv.size());
  ConstTokenMap* const maps[] = {&p.q, &p.k, &p.v};
  TokenMap* const gradients[] = {&params.dq, &params.dk, &params.dv};
  for (int i = 0; i < 3; ++i) {
    *maps[i] = map_of<ConstTokenMap>(call, qkv.data() + i * width * item, 3 * width);
    *gradients[i] = map_of<TokenMap>(call, dqkv.data() + i * width * item, 3 * width);
  }
  p.out = map_of<TokenMap>(call, out.data(), width);
  params.dout = map_of<ConstTokenMap>(call, dout.data(), width);
  std::vector<float> lse(static_cast<std::size_t>(call.batch * product(g.num_windows) * call.heads * n));
  p.lse = lse.data();
  std::vector<float> bias, dbias, logit_scale, dlogit_scale;
  if (call.bias == kTable) bias = numbers.floats(table_rows * call.heads);
  if (call.bias == kDense) bias = numbers.floats(call.heads * n * n);
  dbias.resize(bias.size());
  (call.bias == kTable ? p.bias_table : p.bias) = bias.empty() ? nullptr : bias.data();
  (call.bias == kTable ? params.dbias_table : params.dbias) = dbias.empty() ? nullptr : dbias.data();
  if (call.cosine != 0) {
    logit_scale = numbers.floats(call.heads);
    dlogit_scale.resize(logit_scale.size());
    p.logit_scale = logit_scale.data();
    params.dlogit_scale = dlogit_scale.data();
  }
  if (call.pass == kHalf) return run_half(call, p, numbers);
  std::vector<char> workspace(static_cast<std::size_t>(cpu::window_attention_backward_workspace_bytes(params)));
  params.workspace = workspace.data();

  if (call.pass == kForward) return measure([&] { cpu::window_attention_forward(p, one_thread); });
  cpu::window_attention_forward(p, one_thread);  // computes lse
  measure([&] { cpu::window_attention_backward(params, one_thread); });
}

template <class Call>
void run_as(const int32_t* numbers) {
  Call call;
  std::memcpy(&call, numbers, sizeof call);
  run(call);
}

}  // namespace
}  // namespace swinkernels

int main(int count, char** arguments) {
  std::puts(swinkernels::cpu::instruction_set());
  for (int i = 1; i < count; ++i) {
    int32_t numbers[sizeof(swinkernels::Call) / sizeof(int32_t)] = {};
    char* next = arguments[i];
    for (int32_t& number : numbers) {
      number = static_cast<int32_t>(std::strtol(next, &next, 10));
      if (*next == ',') ++next;
    }
    numbers[0] == swinkernels::kLinear ? swinkernels::run_as<swinkernels::LinearCall>(numbers)
                                       : swinkernels::run_as<swinkernels::Call>(numbers);
  }
  return 0;
}
