// The window attention ops on torch's stable ABI: fill the params, allocate, launch. Arguments were checked in
// swinkernels/ops; what is checked here are the promises that the kernels rely on.
#include "params/window_attention.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "geometry.h"
#include "params/window_attention_cpu.h"
#ifdef SWINKERNELS_WITH_CUDA
#include "params/window_attention_cuda.h"
#endif

namespace swinkernels {
namespace {

// The backend-specific half of an op.
struct CpuBackend {
  // Bytes that data pointers and strides are multiples of, of maps whose heads have so many bytes.
  static int64_t alignment(int64_t) { return 1; }
  explicit CpuBackend(const Tensor&) {}
  static void parallel_for(int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }
  void forward(const WindowAttentionForwardParams& p) const { cpu::window_attention_forward(p, parallel_for); }
  int64_t workspace_bytes(const WindowAttentionBackwardParams& p) const {
    return cpu::window_attention_backward_workspace_bytes(p);
  }
  void backward(const WindowAttentionBackwardParams& p) const { cpu::window_attention_backward(p, parallel_for); }
};

#ifdef SWINKERNELS_WITH_CUDA
struct CudaBackend : CurrentStream {
  static int64_t alignment(int64_t row_bytes) { return cuda::row_alignment(row_bytes); }
  using CurrentStream::CurrentStream;
  void forward(const WindowAttentionForwardParams& p) const {
    STD_CUDA_CHECK(cuda::window_attention_forward(p, stream));
  }
  int64_t workspace_bytes(const WindowAttentionBackwardParams& p) const {
    return cuda::window_attention_backward_workspace_bytes(p);
  }
  void backward(const WindowAttentionBackwardParams& p) const {
    STD_CUDA_CHECK(cuda::window_attention_backward(p, stream));
  }
};
#endif

// The strides of x (B, *S, ...) as a map whose heads are head_stride apart, from element `offset` on.
template <class Pointer, class Data>
TokenMapOf<Pointer> token_map(const Tensor& x, Data* data, int64_t offset, int64_t rank, int64_t head_stride) {
  const Pointer first = data + offset * static_cast<int64_t>(x.element_size());
  return {feature_map(x, first, rank), head_stride};
}

ConstTokenMap input_map(const Tensor& x, int64_t offset, int64_t rank, int64_t head_stride) {
  return token_map<const void*>(x, static_cast<const char*>(x.const_data_ptr()), offset, rank, head_stride);
}

TokenMap output_map(const Tensor& x, int64_t offset, int64_t rank, int64_t head_stride) {
  return token_map<void*>(x, static_cast<char*>(x.mutable_data_ptr()), offset, rank, head_stride);
}

// The arguments that both passes of both forms share, in schema order.
struct Options {
  OptionalTensor bias_table, bias, logit_scale, pad_qkv, region_map, dropout_seed;
  Ints window_size, shift_size, table_window, pad_before, periodic;
  bool roll_then_pad, grid;
  double scale, mask_value, dropout_p;
  bool allow_tf32;
};

// Everything but the data: x (B, *S, ..., num_heads, head_dim) with S of `rank` axes.
void fill(WindowAttentionForwardParams& p, const Tensor& x, int64_t rank, const Options& o) {
  p.dtype = dtype_of(x);
  p.allow_tf32 = o.allow_tf32;
  p.batch = x.size(0);
  p.num_heads = static_cast<int32_t>(x.size(x.dim() - 2));
  p.head_dim = static_cast<int32_t>(x.size(x.dim() - 1));
  p.scale = static_cast<float>(o.scale);
  p.mask_value = static_cast<float>(o.mask_value);
  p.dropout_p = static_cast<float>(o.dropout_p);
  const std::vector<int64_t> shape = sizes(x, 1 + rank);
  WindowGeometry& g = p.geometry;
  static_cast<FrameGeometry&>(g) =
      frame_geometry({shape.begin() + 1, shape.end()}, o.window_size, o.shift_size, o.pad_before, o.roll_then_pad);
  STD_TORCH_CHECK(o.table_window.size() == 3 && o.periodic.size() == 3,
                  "swinkernels: every geometry list has three values, slowest axis first");
  for (int64_t i = 0; i < 3; ++i) {
    g.table_window[i] = static_cast<int32_t>(o.table_window[i]);
    g.periodic[i] = o.periodic[i] != 0;
  }
  g.grid = o.grid;
}

int64_t product(const int32_t (&v)[3]) { return int64_t{1} * v[0] * v[1] * v[2]; }

// The small tensors, contiguous, kept alive by the caller through `o`.
void fill_tables(WindowAttentionForwardParams& p, Options& o) {
  for (OptionalTensor* t : {&o.bias_table, &o.bias, &o.logit_scale, &o.pad_qkv, &o.region_map, &o.dropout_seed}) {
    if (*t && !(*t)->is_contiguous()) *t = torch::stable::contiguous(**t);
  }
  const WindowGeometry& g = p.geometry;
  if (o.bias_table) {
    int64_t rows = 1;
    for (int32_t w : g.table_window) rows *= 2 * w - 1;
    STD_TORCH_CHECK(o.bias_table->scalar_type() == ScalarType::Float && o.bias_table->numel() == rows * p.num_heads,
                    "swinkernels: bias_table must be float32 of prod(2 * table_window - 1) rows");
    p.bias_table = static_cast<const float*>(o.bias_table->const_data_ptr());
  }
  p.bias_types = 1;
  if (o.bias) {
    const int64_t n = product(g.window), windows = product(g.num_windows), of_a_type = p.num_heads * n * n;
    const int64_t types = o.bias->numel() / of_a_type;
    STD_TORCH_CHECK(o.bias->scalar_type() == ScalarType::Float && types > 0 && windows % types == 0 &&
                        o.bias->numel() == types * of_a_type && !o.bias_table,
                    "swinkernels: bias must be float32, (types, num_heads, N, N), and the only bias");
    p.bias = static_cast<const float*>(o.bias->const_data_ptr());
    p.bias_types = static_cast<int32_t>(types);
  }
  if (o.logit_scale) {
    STD_TORCH_CHECK(o.logit_scale->scalar_type() == ScalarType::Float && o.logit_scale->numel() == p.num_heads,
                    "swinkernels: logit_scale must be float32, one value for each head");
    p.logit_scale = static_cast<const float*>(o.logit_scale->const_data_ptr());
  }
  STD_TORCH_CHECK(o.dropout_p == 0 || o.dropout_seed, "swinkernels: dropout needs a seed");
  if (o.dropout_seed) {
    STD_TORCH_CHECK(o.dropout_seed->scalar_type() == ScalarType::Long && o.dropout_seed->numel() == 1,
                    "swinkernels: dropout_seed must be one int64");
    p.dropout_seed = static_cast<const int64_t*>(o.dropout_seed->const_data_ptr());
  }
  if (o.pad_qkv) {
    STD_TORCH_CHECK(dtype_of(*o.pad_qkv) == p.dtype && o.pad_qkv->numel() == int64_t{3} * p.num_heads * p.head_dim,
                    "swinkernels: pad_qkv must be (3, num_heads, head_dim) of the map's dtype");
    *o.pad_qkv = readable(*o.pad_qkv, 16);
    p.pad_qkv = o.pad_qkv->const_data_ptr();
  }
  if (o.region_map) {
    STD_TORCH_CHECK(o.region_map->scalar_type() == ScalarType::Int &&
                        o.region_map->numel() == int64_t{1} * g.frame[0] * g.frame[1] * g.frame[2],
                    "swinkernels: region_map must be int32 of the frame's shape");
    p.region_map = static_cast<const int32_t*>(o.region_map->const_data_ptr());
  }
}

// Where q, k and v (or their gradients) lie: packed in one tensor (B, *S, 3, heads, head_dim), or in three.
struct Packed {
  static constexpr int64_t kTensors = 1;
  static int64_t rank(const Tensor& x) { return x.dim() - 4; }
  template <class Map, class MakeMap>
  static void place(Map* const (&maps)[3], const std::vector<Tensor>& xs, MakeMap make) {
    const Tensor& x = xs[0];
    for (int64_t i = 0; i < 3; ++i) *maps[i] = make(x, i * x.stride(x.dim() - 3), rank(x), x.stride(x.dim() - 2));
  }
};

struct Separate {
  static constexpr int64_t kTensors = 3;
  static int64_t rank(const Tensor& x) { return x.dim() - 3; }
  template <class Map, class MakeMap>
  static void place(Map* const (&maps)[3], const std::vector<Tensor>& xs, MakeMap make) {
    for (int64_t i = 0; i < 3; ++i) *maps[i] = make(xs[i], 0, rank(xs[i]), xs[i].stride(xs[i].dim() - 2));
  }
};

// Of one head of a token.
int64_t row_bytes(const Tensor& x) { return x.size(x.dim() - 1) * static_cast<int64_t>(x.element_size()); }

template <class Backend, class Form>
std::tuple<Tensor, Tensor> forward(std::vector<Tensor> xs, Options o, bool needs_lse) {
  const Backend backend(xs[0]);
  const int64_t alignment = Backend::alignment(row_bytes(xs[0]));
  for (Tensor& x : xs) x = readable(x, alignment);
  const Tensor& x = xs[0];
  const int64_t rank = Form::rank(x);
  WindowAttentionForwardParams p{};
  fill(p, x, rank, o);
  fill_tables(p, o);
  const WindowGeometry& g = p.geometry;

  std::vector<int64_t> shape = sizes(x, 1 + rank);
  shape.push_back(int64_t{1} * p.num_heads * p.head_dim);
  Tensor out = new_empty(x, shape);
  const std::vector<int64_t> lse_shape = {p.batch, product(g.num_windows), p.num_heads, product(g.window)};
  Tensor lse = new_empty(x, needs_lse ? lse_shape : std::vector<int64_t>{0}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  Form::place({&p.q, &p.k, &p.v}, xs, input_map);
  p.out = output_map(out, 0, rank, p.head_dim);
  p.lse = needs_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  backend.forward(p);
  return {out, lse};
}

struct Gradients {
  std::vector<Tensor> maps;
  OptionalTensor bias_table, bias, logit_scale, pad_qkv;  // those that were wanted
};

// Which gradients are wanted beside those of the maps.
struct Needs {
  bool bias_table, bias, logit_scale, pad_qkv;
};

template <class Backend, class Form>
Gradients backward(Tensor dout, std::vector<Tensor> xs, Tensor lse, Options o, Needs needs) {
  const Backend backend(xs[0]);
  const int64_t alignment = Backend::alignment(row_bytes(xs[0]));
  for (Tensor& x : xs) x = readable(x, alignment);
  dout = readable(dout, alignment);
  if (!lse.is_contiguous()) lse = torch::stable::contiguous(lse);
  const Tensor& x = xs[0];
  const int64_t rank = Form::rank(x);
  WindowAttentionBackwardParams p{};
  fill(p.forward, x, rank, o);
  fill_tables(p.forward, o);
  STD_TORCH_CHECK(dtype_of(dout) == p.forward.dtype, "swinkernels: dout must have the map's dtype");
  const WindowGeometry& g = p.forward.geometry;
  STD_TORCH_CHECK(lse.numel() == p.forward.batch * product(g.num_windows) * p.forward.num_heads * product(g.window),
                  "swinkernels: lse must be that of a forward pass that was asked for it (needs_lse)");

  // new_zeros, so that an empty batch has the gradient zero; otherwise the kernels write every element.
  const bool empty = x.numel() == 0;
  auto allocate = [&](bool needed, const std::vector<int64_t>& shape) -> OptionalTensor {
    if (!needed) return std::nullopt;
    return empty ? torch::stable::new_zeros(x, shape, ScalarType::Float) : new_empty(x, shape, ScalarType::Float);
  };
  Gradients grads;
  for (const Tensor& t : xs) grads.maps.push_back(new_empty(t, sizes(t, t.dim())));
  auto like = [&](bool needed, const OptionalTensor& t) {
    STD_TORCH_CHECK(!needed || t, "swinkernels: the gradient of a tensor that was not given is wanted");
    return allocate(needed, needed ? sizes(*t, t->dim()) : std::vector<int64_t>{});
  };
  grads.bias_table = like(needs.bias_table, o.bias_table);
  grads.bias = like(needs.bias, o.bias);
  grads.logit_scale = like(needs.logit_scale, o.logit_scale);
  grads.pad_qkv = like(needs.pad_qkv, o.pad_qkv);
  if (empty) return grads;

  Form::place({&p.forward.q, &p.forward.k, &p.forward.v}, xs, input_map);
  Form::place({&p.dq, &p.dk, &p.dv}, grads.maps, output_map);
  p.dout = input_map(dout, 0, rank, p.forward.head_dim);
  p.forward.lse = static_cast<float*>(lse.mutable_data_ptr());  // only read
  auto data = [](const OptionalTensor& t) { return t ? static_cast<float*>(t->mutable_data_ptr()) : nullptr; };
  p.dbias_table = data(grads.bias_table);
  p.dbias = data(grads.bias);
  p.dlogit_scale = data(grads.logit_scale);
  p.dpad_qkv = data(grads.pad_qkv);
  Tensor workspace = new_empty(x, {backend.workspace_bytes(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  backend.backward(p);
  return grads;
}

// The ops, with the argument lists of the schemas in swinkernels/ops/window_attention.py.
#define SWINKERNELS_OPTIONS                                                                                         \
  OptionalTensor bias_table, OptionalTensor bias, OptionalTensor logit_scale, OptionalTensor pad_qkv,               \
      OptionalTensor region_map, OptionalTensor dropout_seed, Ints window_size, Ints shift_size, Ints table_window, \
      Ints pad_before, Ints periodic, bool roll_then_pad, bool grid, double scale, double mask_value,               \
      double dropout_p, bool allow_tf32
#define SWINKERNELS_MAKE_OPTIONS                                                                             \
  Options {                                                                                                  \
    bias_table, bias, logit_scale, pad_qkv, region_map, dropout_seed, window_size, shift_size, table_window, \
        pad_before, periodic, roll_then_pad, grid, scale, mask_value, dropout_p, allow_tf32                  \
  }
// What the schema has for a gradient that is not wanted: nothing.
Tensor sum(const OptionalTensor& gradient, const Tensor& x) {
  return gradient ? *gradient : new_empty(x, {0}, ScalarType::Float);
}

#define SWINKERNELS_NEEDS bool needs_dbias_table, bool needs_dbias, bool needs_dlogit_scale, bool needs_dpad_qkv
#define SWINKERNELS_MAKE_NEEDS \
  Needs { needs_dbias_table, needs_dbias, needs_dlogit_scale, needs_dpad_qkv }

template <class Backend>
std::tuple<Tensor, Tensor> qkvpacked_fwd(Tensor qkv, SWINKERNELS_OPTIONS, bool needs_lse) {
  return forward<Backend, Packed>({qkv}, SWINKERNELS_MAKE_OPTIONS, needs_lse);
}

template <class Backend>
std::tuple<Tensor, Tensor> fwd(Tensor q, Tensor k, Tensor v, SWINKERNELS_OPTIONS, bool needs_lse) {
  return forward<Backend, Separate>({q, k, v}, SWINKERNELS_MAKE_OPTIONS, needs_lse);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> qkvpacked_bwd(Tensor dout, Tensor qkv, Tensor lse,
                                                                 SWINKERNELS_OPTIONS, SWINKERNELS_NEEDS) {
  Gradients d = backward<Backend, Packed>(dout, {qkv}, lse, SWINKERNELS_MAKE_OPTIONS, SWINKERNELS_MAKE_NEEDS);
  return {d.maps[0], sum(d.bias_table, qkv), sum(d.bias, qkv), sum(d.logit_scale, qkv), sum(d.pad_qkv, qkv)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                                       Tensor lse, SWINKERNELS_OPTIONS,
                                                                       SWINKERNELS_NEEDS) {
  Gradients d = backward<Backend, Separate>(dout, {q, k, v}, lse, SWINKERNELS_MAKE_OPTIONS, SWINKERNELS_MAKE_NEEDS);
  return {d.maps[0],        d.maps[1], d.maps[2], sum(d.bias_table, q), sum(d.bias, q), sum(d.logit_scale, q),
          sum(d.pad_qkv, q)};
}

// The same ops called at less cost: what is no tensor comes as one float64 tensor on the CPU, whose values are those of
// the schema in its order, lists laid out. The gradients that are not wanted are one empty tensor.
Options unpack(const Tensor& numbers, OptionalTensor bias_table, OptionalTensor bias, OptionalTensor logit_scale,
               OptionalTensor pad_qkv, OptionalTensor region_map, OptionalTensor dropout_seed) {
  constexpr int64_t kNumbers = 5 * 3 + 6;
  STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Double && numbers.numel() == kNumbers && numbers.is_contiguous(),
                  "swinkernels: numbers must be ", kNumbers, " of float64");
  const double* next = static_cast<const double*>(numbers.const_data_ptr());
  auto ints = [&] {
    const double* first = next;
    next += 3;
    return Ints(first, next);
  };
  Options o{bias_table, bias, logit_scale, pad_qkv, region_map, dropout_seed};
  for (Ints* list : {&o.window_size, &o.shift_size, &o.table_window, &o.pad_before, &o.periodic}) *list = ints();
  for (bool* flag : {&o.roll_then_pad, &o.grid}) *flag = *next++ != 0;
  for (double* number : {&o.scale, &o.mask_value, &o.dropout_p}) *number = *next++;
  o.allow_tf32 = *next != 0;
  return o;
}

#define SWINKERNELS_TABLES                                                                            \
  OptionalTensor bias_table, OptionalTensor bias, OptionalTensor logit_scale, OptionalTensor pad_qkv, \
      OptionalTensor region_map, OptionalTensor dropout_seed
#define SWINKERNELS_UNPACK unpack(numbers, bias_table, bias, logit_scale, pad_qkv, region_map, dropout_seed)

template <class Backend>
std::tuple<Tensor, Tensor> qkvpacked_fwd_short(Tensor qkv, SWINKERNELS_TABLES, Tensor numbers, bool needs_lse) {
  return forward<Backend, Packed>({qkv}, SWINKERNELS_UNPACK, needs_lse);
}

template <class Backend>
std::tuple<Tensor, Tensor> fwd_short(Tensor q, Tensor k, Tensor v, SWINKERNELS_TABLES, Tensor numbers, bool needs_lse) {
  return forward<Backend, Separate>({q, k, v}, SWINKERNELS_UNPACK, needs_lse);
}

Needs needs_of(int64_t wanted) {
  auto bit = [&](int i) { return (wanted >> i & 1) != 0; };
  return {bit(0), bit(1), bit(2), bit(3)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> qkvpacked_bwd_short(Tensor dout, Tensor qkv, Tensor lse,
                                                                       SWINKERNELS_TABLES, Tensor numbers,
                                                                       int64_t wanted) {
  Gradients d = backward<Backend, Packed>(dout, {qkv}, lse, SWINKERNELS_UNPACK, needs_of(wanted));
  const Tensor none = new_empty(qkv, {0}, ScalarType::Float);
  return {d.maps[0], d.bias_table.value_or(none), d.bias.value_or(none), d.logit_scale.value_or(none),
          d.pad_qkv.value_or(none)};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd_short(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                                             Tensor lse, SWINKERNELS_TABLES,
                                                                             Tensor numbers, int64_t wanted) {
  Gradients d = backward<Backend, Separate>(dout, {q, k, v}, lse, SWINKERNELS_UNPACK, needs_of(wanted));
  const Tensor none = new_empty(q, {0}, ScalarType::Float);
  return {d.maps[0],
          d.maps[1],
          d.maps[2],
          d.bias_table.value_or(none),
          d.bias.value_or(none),
          d.logit_scale.value_or(none),
          d.pad_qkv.value_or(none)};
}

template <class Backend, class Library>
void implement(Library& m) {
  m.impl("window_attention_qkvpacked_fwd_short", TORCH_BOX(&qkvpacked_fwd_short<Backend>));
  m.impl("window_attention_qkvpacked_bwd_short", TORCH_BOX(&qkvpacked_bwd_short<Backend>));
  m.impl("window_attention_fwd_short", TORCH_BOX(&fwd_short<Backend>));
  m.impl("window_attention_bwd_short", TORCH_BOX(&bwd_short<Backend>));
  m.impl("window_attention_qkvpacked_fwd", TORCH_BOX(&qkvpacked_fwd<Backend>));
  m.impl("window_attention_qkvpacked_bwd", TORCH_BOX(&qkvpacked_bwd<Backend>));
  m.impl("window_attention_fwd", TORCH_BOX(&fwd<Backend>));
  m.impl("window_attention_bwd", TORCH_BOX(&bwd<Backend>));
}

std::string cpu_instruction_set() { return cpu::instruction_set(); }

STABLE_TORCH_LIBRARY_FRAGMENT(swinkernels, m) { m.def("cpu_instruction_set() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(swinkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}
STABLE_TORCH_LIBRARY_IMPL(swinkernels, CPU, m) { implement<CpuBackend>(m); }
#ifdef SWINKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(swinkernels, CUDA, m) { implement<CudaBackend>(m); }
#endif

}  // namespace
}  // namespace swinkernels
