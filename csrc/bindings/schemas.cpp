// The schemas of all ops. A program without Python, such as one that runs an AOTInductor package, can call the ops
// after it has loaded this library. In Python, swinkernels/ops adds fake implementations and derivatives, and defines
// the same schemas if there is no compiled library.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_facts.h"  // SWINKERNELS_NAMESPACE

namespace swinkernels {
namespace {

// Triton and CUDA C++ kernels use the same dispatch key, so an op that both implement is defined twice.
const char* const kSuffixes[] = {"", "_triton"};

template <class Library>
void window_attention(Library& m, const std::string& name, const std::string& maps, const std::string& gradients) {
  const std::string tables =
      "Tensor? bias_table, Tensor? bias, Tensor? logit_scale, Tensor? pad_qkv, Tensor? region_map, "
      "Tensor? dropout_seed";
  const std::string spec = "str spec, float scale, float mask_value, float dropout_p";
  const std::string sums = "Tensor dbias_table, Tensor dbias, Tensor dlogit_scale, Tensor dpad_qkv";
  for (const std::string suffix : kSuffixes) {
    const std::string fwd = name + "_fwd" + suffix, bwd = name + "_bwd" + suffix;
    m.def((fwd + "(" + maps + ", " + tables + ", " + spec + ") -> (Tensor out, Tensor lse)").c_str());
    m.def((bwd + "(Tensor dout, " + maps + ", Tensor lse, " + tables + ", " + spec + ", int wanted) -> (" + gradients +
           ", " + sums + ")")
              .c_str());
  }
}

template <class Library>
void window_partition(Library& m) {
  const std::string geometry = "int[] window_size, int[] shift_size, bool roll_then_pad";
  for (const std::string suffix : kSuffixes) {
    m.def(("window_partition" + suffix + "(Tensor x, " + geometry + ") -> Tensor").c_str());
    m.def(("window_reverse" + suffix + "(Tensor windows, SymInt[] size, " + geometry + ") -> Tensor").c_str());
  }
}

template <class Library>
void patch_merging(Library& m) {
  const std::string pieces = "int[] factor, int[] neighbours";
  for (const std::string suffix : kSuffixes) {
    m.def(("patch_merging_norm_fwd" + suffix + "(Tensor x, Tensor? weight, Tensor? bias, " + pieces +
           ", float eps, ScalarType dtype) -> (Tensor z, Tensor mean, Tensor rstd)")
              .c_str());
    m.def(("patch_merging_norm_bwd" + suffix + "(Tensor dz, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, " +
           pieces + ", bool needs_dweight, bool needs_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)")
              .c_str());
  }
}

template <class Library>
void layer_norm(Library& m) {
  m.def(
      "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, int[] factor, float eps, ScalarType dtype) -> "
      "(Tensor z, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_bwd(Tensor dz, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, int[] factor, "
      "bool needs_dweight, bool needs_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

template <class Library>
void residual_layer_norm(Library& m) {
  const std::string branch = "(Tensor x, Tensor y, Tensor? drop_path_scale, Tensor? weight, Tensor? bias, float eps)";
  const std::string saved =
      "Tensor? drop_path_scale, Tensor? weight, Tensor mean, Tensor rstd, bool needs_dweight, bool needs_dbias";
  m.def(("residual_layer_norm_fwd" + branch + " -> (Tensor s, Tensor z, Tensor mean, Tensor rstd)").c_str());
  m.def(("residual_layer_norm_bwd(Tensor ds, Tensor dz, Tensor s, " + saved +
         ") -> (Tensor dx, Tensor dy, Tensor dweight, Tensor dbias)")
            .c_str());
  m.def(("residual_post_norm_fwd" + branch + " -> (Tensor s, Tensor mean, Tensor rstd)").c_str());
  m.def(("residual_post_norm_bwd(Tensor ds, Tensor y, " + saved + ") -> (Tensor dy, Tensor dweight, Tensor dbias)")
            .c_str());
}

template <class Library>
void mlp_half(Library& m) {
  m.def(
      "mlp_half_triton(Tensor x, Tensor? branch, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, "
      "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, float eps, bool post, bool tanh) -> Tensor");
}

template <class Library>
void fused(Library& m) {
  const std::string norm = "Tensor? norm_weight, Tensor? norm_bias", of_norm = "str norm, float eps";
  m.def(("fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, " + norm + ", str gelu, " + of_norm +
         ") -> Tensor")
            .c_str());
  m.def(("fused_patch_linear(Tensor x, Tensor weight, Tensor? bias, " + norm +
         ", int[] factor, int[] neighbours, bool channels_first, " + of_norm + ") -> Tensor")
            .c_str());
  m.def(("fused_mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
         "Tensor? residual, " +
         norm + ", str gelu, " + of_norm + ", bool? by_layers) -> Tensor")
            .c_str());
  m.def(("fused_attention_half(Tensor x, Tensor q_weight, Tensor? k_weight, Tensor? v_weight, Tensor? qkv_bias, "
         "Tensor proj_weight, Tensor? proj_bias, " +
         norm +
         ", Tensor? bias_table, Tensor? bias, Tensor? logit_scale, Tensor? region_map, str spec, float scale, "
         "float mask_value, int num_heads, bool residual, " +
         of_norm + ", bool? by_layers) -> Tensor")
            .c_str());
  m.def("fused_position_bias(Tensor offsets, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight) -> Tensor");
}

STABLE_TORCH_LIBRARY(SWINKERNELS_NAMESPACE, m) {
  m.def("build_info() -> str");
  m.def("cpu_instruction_set() -> str");
  window_attention(m, "window_attention_qkvpacked", "Tensor qkv", "Tensor dqkv");
  window_attention(m, "window_attention", "Tensor q, Tensor k, Tensor v", "Tensor dq, Tensor dk, Tensor dv");
  window_partition(m);
  patch_merging(m);
  layer_norm(m);
  residual_layer_norm(m);
  mlp_half(m);
  fused(m);
}

}  // namespace
}  // namespace swinkernels
