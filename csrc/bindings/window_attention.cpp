// The bindings of window attention, on torch's stable ABI: they set the params, allocate the outputs and launch the
// kernels. swinkernels/ops checks the arguments; the checks here guard the kernels' assumptions.
#include "params/window_attention.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_facts.h"  // SWINKERNELS_NAMESPACE
#include "checks.h"
#ifndef SWINKERNELS_WITHOUT_CPU
#include "params/window_attention_cpu.h"
#endif
#ifdef SWINKERNELS_WITH_CUDA
#include "params/window_attention_cuda.h"
#endif
#include "window_call.h"

namespace swinkernels {
namespace {

// The backend-specific part of each op.
#ifndef SWINKERNELS_WITHOUT_CPU
struct CpuBackend {
  // Returns the required alignment of data pointers and strides in bytes, given the bytes of one head of a token.
  static int64_t alignment(int64_t) { return 1; }
  static constexpr bool kAxisTablesNeedRegularTokens = false;
  explicit CpuBackend(const Tensor&) {}
  void forward(const WindowAttentionForwardParams& p) const { cpu::window_attention_forward(p, parallel_for); }
  int64_t workspace_bytes(const WindowAttentionBackwardParams& p) const {
    return cpu::window_attention_backward_workspace_bytes(p);
  }
  void backward(const WindowAttentionBackwardParams& p) const { cpu::window_attention_backward(p, parallel_for); }
};
#endif

#ifdef SWINKERNELS_WITH_CUDA
struct CudaBackend : CurrentStream {
  static int64_t alignment(int64_t row_bytes) { return cuda::row_alignment(row_bytes); }
  static constexpr bool kAxisTablesNeedRegularTokens = true;
  using CurrentStream::CurrentStream;
  void forward(const WindowAttentionForwardParams& p) const {
    SWINKERNELS_CUDA_CHECK(cuda::window_attention_forward(p, stream));
  }
  int64_t workspace_bytes(const WindowAttentionBackwardParams& p) const {
    return cuda::window_attention_backward_workspace_bytes(p);
  }
  void backward(const WindowAttentionBackwardParams& p) const {
    SWINKERNELS_CUDA_CHECK(cuda::window_attention_backward(p, stream));
  }
};
#endif

// Returns the number of bytes of one head of a token.
int64_t row_bytes(const Tensor& x) { return x.size(x.dim() - 1) * static_cast<int64_t>(x.element_size()); }

// The ops of one form: q, k and v are one map (B, *S, 3, heads, head_dim) or three (B, *S, heads, head_dim).
// schemas.cpp lists their arguments.
template <class Backend, class... Maps>
struct WindowAttention {
  static constexpr bool kPacked = sizeof...(Maps) == 1;
  using Gradients = std::tuple<Maps..., Tensor, Tensor, Tensor, Tensor>;

  static int64_t rank(const Tensor& x) { return x.dim() - (kPacked ? 4 : 3); }

  // Returns x itself if the kernels can read it in place, else a copy.
  static Tensor in_place_or_copied(const Tensor& x, int64_t rank, int64_t alignment, const WindowSpec& spec) {
    const bool regular = Backend::kAxisTablesNeedRegularTokens && spec.axis_tables;
    return readable(regular ? with_regular_tokens(x, rank) : x, alignment);
  }

  // Points the maps to q, k and v, or to their gradients.
  template <class Map, class MakeMap>
  static void place(Map* const (&maps)[3], const std::vector<Tensor>& xs, MakeMap make) {
    for (int64_t i = 0; i < 3; ++i) {
      const Tensor& x = xs[kPacked ? 0 : i];
      *maps[i] = make(x, kPacked ? i * x.stride(x.dim() - 3) : 0, rank(x), x.stride(x.dim() - 2));
    }
  }

  static std::tuple<Tensor, Tensor> forward(Maps... maps, OptionalTensor bias_table, OptionalTensor bias,
                                            OptionalTensor logit_scale, OptionalTensor pad_qkv,
                                            OptionalTensor region_map, OptionalTensor dropout_seed, std::string wire,
                                            double scale, double mask_value, double dropout_p) {
    const WindowSpec spec(wire, scale, mask_value, dropout_p);
    std::vector<Tensor> xs{std::move(maps)...};
    Tables tables{std::move(bias_table), std::move(bias),       std::move(logit_scale),
                  std::move(pad_qkv),    std::move(region_map), std::move(dropout_seed)};
    const Backend backend(xs[0]);
    const int64_t alignment = Backend::alignment(row_bytes(xs[0]));
    for (Tensor& x : xs) x = in_place_or_copied(x, rank(x), alignment, spec);
    const Tensor& x = xs[0];
    WindowAttentionForwardParams p{};
    fill(p, x, rank(x), spec);
    fill_tables(p, tables, spec, rank(x));
    const WindowGeometry& g = p.geometry;

    std::vector<int64_t> shape = sizes(x, 1 + rank(x));
    shape.push_back(int64_t{1} * p.num_heads * p.head_dim);
    Tensor out = new_empty(x, shape);
    const std::vector<int64_t> rows{p.batch, product(g.num_windows), p.num_heads, product(g.window)};
    Tensor lse = new_empty(x, spec.needs_lse ? rows : std::vector<int64_t>{0}, ScalarType::Float);
    if (out.numel() == 0) return {out, lse};
    place({&p.q, &p.k, &p.v}, xs, input_map);
    p.out = output_map(out, 0, rank(x), p.head_dim);
    p.lse = spec.needs_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
    backend.forward(p);
    return {out, lse};
  }

  static Gradients backward(Tensor dout, Maps... maps, Tensor lse, OptionalTensor bias_table, OptionalTensor bias,
                            OptionalTensor logit_scale, OptionalTensor pad_qkv, OptionalTensor region_map,
                            OptionalTensor dropout_seed, std::string wire, double scale, double mask_value,
                            double dropout_p, int64_t wanted) {
    const WindowSpec spec(wire, scale, mask_value, dropout_p);
    std::vector<Tensor> xs{std::move(maps)...};
    Tables tables{std::move(bias_table), std::move(bias),       std::move(logit_scale),
                  std::move(pad_qkv),    std::move(region_map), std::move(dropout_seed)};
    const Backend backend(xs[0]);
    const int64_t alignment = Backend::alignment(row_bytes(xs[0]));
    for (Tensor& x : xs) x = in_place_or_copied(x, rank(x), alignment, spec);
    dout = in_place_or_copied(dout, rank(xs[0]), alignment, spec);
    if (!lse.is_contiguous()) lse = as_contiguous(lse);
    const Tensor& x = xs[0];
    WindowAttentionBackwardParams p{};
    fill(p.forward, x, rank(x), spec);
    fill_tables(p.forward, tables, spec, rank(x));
    STD_TORCH_CHECK(dtype_of(dout) == p.forward.dtype, "swinkernels: dout must have the map's dtype");

    std::vector<Tensor> gradients;
    for (const Tensor& t : xs) gradients.push_back(new_empty(t, sizes(t, t.dim())));
    // An empty batch gets zero gradients from new_zeros; otherwise the kernels write every element. Bit i of wanted
    // requests the gradient of table i; the other gradients have no elements, because the schema has no optional
    // results.
    const bool empty = x.numel() == 0;
    const auto sum = [&](int bit, const OptionalTensor& table) {
      const bool needed = (wanted >> bit & 1) != 0;
      STD_TORCH_CHECK(!needed || table, "swinkernels: a gradient is wanted for a tensor that was not given");
      const std::vector<int64_t> shape = needed ? sizes(*table, table->dim()) : std::vector<int64_t>{0};
      return empty ? torch::stable::new_zeros(x, shape, ScalarType::Float) : new_empty(x, shape, ScalarType::Float);
    };
    const Tensor sums[] = {sum(0, tables.bias_table), sum(1, tables.bias), sum(2, tables.logit_scale),
                           sum(3, tables.pad_qkv)};
    if (!empty) {
      STD_TORCH_CHECK(lse.numel() > 0, "swinkernels: a backward pass needs the lse of a forward pass with needs_lse=1");
      place({&p.forward.q, &p.forward.k, &p.forward.v}, xs, input_map);
      place({&p.dq, &p.dk, &p.dv}, gradients, output_map);
      p.dout = input_map(dout, 0, rank(x), p.forward.head_dim);
      p.forward.lse = static_cast<float*>(lse.mutable_data_ptr());  // only read
      const auto data = [&](int bit) {
        return (wanted >> bit & 1) != 0 ? static_cast<float*>(sums[bit].mutable_data_ptr()) : nullptr;
      };
      p.dbias_table = data(0);
      (spec.axis_tables ? p.daxis_tables : p.dbias) = data(1);
      p.dlogit_scale = data(2);
      p.dpad_qkv = data(3);
      Tensor workspace = new_empty(x, {backend.workspace_bytes(p)}, ScalarType::Byte);
      p.workspace = workspace.mutable_data_ptr();
      backend.backward(p);
    }
    return gather(gradients, sums, std::index_sequence_for<Maps...>());
  }

 private:
  template <size_t... kIndices>
  static Gradients gather(const std::vector<Tensor>& maps, const Tensor (&sums)[4], std::index_sequence<kIndices...>) {
    return {maps[kIndices]..., sums[0], sums[1], sums[2], sums[3]};
  }
};

template <class Backend, class Library>
void implement(Library& m) {
  using Packed = WindowAttention<Backend, Tensor>;
  using Separate = WindowAttention<Backend, Tensor, Tensor, Tensor>;
  m.impl("window_attention_qkvpacked_fwd", TORCH_BOX(&Packed::forward));
  m.impl("window_attention_qkvpacked_bwd", TORCH_BOX(&Packed::backward));
  m.impl("window_attention_fwd", TORCH_BOX(&Separate::forward));
  m.impl("window_attention_bwd", TORCH_BOX(&Separate::backward));
}

#ifndef SWINKERNELS_WITHOUT_CPU
std::string cpu_instruction_set() { return cpu::instruction_set(); }

STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}
STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, CPU, m) { implement<CpuBackend>(m); }
#endif
#ifdef SWINKERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, SWINKERNELS_CUDA_KEY, m) { implement<CudaBackend>(m); }
#endif

}  // namespace
}  // namespace swinkernels
