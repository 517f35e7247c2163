// The bindings of the norms, on torch's stable ABI: they set the params, allocate the outputs and launch the kernels.
// swinkernels/ops checks the arguments; the checks here guard the kernels' assumptions.
#ifdef SWINKERNELS_WITH_CUDA
#include "params/layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "build_facts.h"  // SWINKERNELS_NAMESPACE
#include "checks.h"
#include "params/layer_norm_cuda.h"

namespace swinkernels {
namespace {

constexpr int64_t kAlignment = 16;  // bytes

using Norm = std::tuple<Tensor, Tensor, Tensor>;       // z or s, mean, rstd
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // dx or dy, dweight, dbias

Tensor map(const Tensor& x) { return packed(x, kAlignment); }
const void* data(const OptionalTensor& x) { return x ? data_of(*x) : nullptr; }
float* floats(const Tensor& x) { return x.numel() == 0 ? nullptr : static_cast<float*>(x.mutable_data_ptr()); }

// Allocates a float32 tensor with one element per row of a tensor with the given shape, whose last axis is normalised.
Tensor statistic(const Tensor& x, std::vector<int64_t> shape) {
  shape.pop_back();
  return torch::stable::new_empty(x, shape, ScalarType::Float);
}

void check_rows(const LayerNormRows& rows, int64_t length) {
  STD_TORCH_CHECK(length > 0 && length <= cuda::kMaxRow, "swinkernels: 1 to ", cuda::kMaxRow,
                  " elements are normalised together, got ", length);
  STD_TORCH_CHECK(rows.count <= INT32_MAX, "swinkernels: at most ", INT32_MAX, " rows are normalised, got ",
                  rows.count);
}

int64_t rows_of(const std::vector<int64_t>& z_shape) {
  int64_t count = 1;
  for (size_t i = 0; i + 1 < z_shape.size(); ++i) count *= z_shape[i];
  return count;
}

LayerNormRows plain_rows(const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(!shape.empty(), "swinkernels: the normalised tensor must have at least one axis, got none");
  LayerNormRows rows{};
  rows.layout = RowLayout::kPlain;
  rows.count = rows_of(shape);
  check_rows(rows, shape.back());
  rows.length = static_cast<int32_t>(shape.back());
  return rows;
}

// Describes the rows of a map x (B, *S, C); z_shape is the shape of z.
LayerNormRows map_rows(RowLayout layout, const Tensor& x, const std::vector<int64_t>& z_shape, const Ints& factor) {
  LayerNormRows rows{};
  rows.layout = layout;
  rows.count = rows_of(z_shape);
  check_rows(rows, z_shape.back());
  rows.length = static_cast<int32_t>(z_shape.back());
  const int64_t rank = x.dim() - 2;
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t size = i < 3 - rank ? 1 : x.size(1 + i - (3 - rank));
    STD_TORCH_CHECK(size > 0 && size <= INT32_MAX, "swinkernels: an axis of a map has 1 to ", INT32_MAX, " tokens");
    rows.size[i] = static_cast<int32_t>(size);
    rows.factor[i] = static_cast<int32_t>(factor[i]);
  }
  return rows;
}

void check_factor(const Tensor& x, const Ints& factor, int64_t most) {
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5, "swinkernels: a map has the shape (B, *S, C)");
  STD_TORCH_CHECK(factor.size() == 3 && (x.dim() == 5 || factor[0] == 1),
                  "swinkernels: factor has three values, slowest axis first; the first is 1 for a 2D map");
  for (const int64_t f : factor) STD_TORCH_CHECK(f >= 1 && f <= most, "swinkernels: factor must be 1 to ", most);
}

int64_t product(const Ints& values) {
  int64_t result = 1;
  for (const int64_t v : values) result *= v;
  return result;
}

struct NormShape {
  std::vector<int64_t> z;
  LayerNormRows rows;
};

// Returns the shape of z and the description of the rows for patch merging.
NormShape merged(const Tensor& x, const Ints& factor, const Ints& neighbours) {
  check_factor(x, factor, 2);
  const int64_t parts = product(factor), last = x.dim() - 1;
  STD_TORCH_CHECK(static_cast<int64_t>(neighbours.size()) == parts, "swinkernels: factor needs ", parts, " neighbours");
  NormShape shape{sizes(x, x.dim()), {}};
  for (int64_t axis = 1; axis < last; ++axis) {
    const int64_t f = factor[axis + 2 - (last - 1)];
    shape.z[axis] = (shape.z[axis] + f - 1) / f;
  }
  shape.z[last] *= parts;
  shape.rows = map_rows(RowLayout::kMerging, x, shape.z, factor);
  for (int64_t p = 0; p < parts; ++p) {
    STD_TORCH_CHECK(neighbours[p] >= 0 && neighbours[p] < parts, "swinkernels: neighbours must be 0 to ", parts - 1);
    shape.rows.neighbours[p] = static_cast<int32_t>(neighbours[p]);
  }
  return shape;
}

// Returns the shape of z and the description of the rows for the plain norm or, with a factor, for patch expanding.
NormShape plain_or_expanded(const Tensor& x, const Ints& factor) {
  NormShape shape{sizes(x, x.dim()), {}};
  if (factor.empty()) {
    shape.rows = plain_rows(shape.z);
    return shape;
  }
  check_factor(x, factor, INT32_MAX);
  const int64_t parts = product(factor), last = x.dim() - 1;
  STD_TORCH_CHECK(shape.z[last] % parts == 0, "swinkernels: channels must be a multiple of ", parts);
  for (int64_t axis = 1; axis < last; ++axis) shape.z[axis] *= factor[axis + 2 - (last - 1)];
  shape.z[last] /= parts;
  shape.rows = map_rows(RowLayout::kExpanding, x, shape.z, factor);
  return shape;
}

// Replaces `parameter` with a contiguous tensor, which the caller keeps alive, and returns its dtype.
DType prepare_parameter(OptionalTensor& parameter, const LayerNormRows& rows) {
  if (!parameter) return DType::kFloat32;
  STD_TORCH_CHECK(parameter->numel() == rows.length, "swinkernels: weight and bias must have ", rows.length,
                  " elements");
  *parameter = as_contiguous(*parameter);
  return dtype_of(*parameter);
}

// Sets drop_path_scale and rows_per_sample.
template <class Params>
void prepare_drop_path(Params& p, OptionalTensor& scale, const Tensor& x) {
  if (!scale) return;
  STD_TORCH_CHECK(x.dim() > 1 && scale->scalar_type() == ScalarType::Float && scale->numel() == x.size(0),
                  "swinkernels: drop_path_scale must be float32, one value for each sample of x (B, ..., C)");
  *scale = as_contiguous(*scale);
  p.drop_path_scale = static_cast<const float*>(data_of(*scale));
  p.rows_per_sample = p.rows.count / std::max<int64_t>(1, x.size(0));
}

void check_same_shape(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(sizes(x, x.dim()) == sizes(y, y.dim()), "swinkernels: stream and branch must have the same shape");
}

Norm norm_forward(Tensor x, OptionalTensor weight, OptionalTensor bias, const NormShape& shape, double eps,
                  ScalarType dtype) {
  const CurrentStream current(x);
  Tensor z = torch::stable::new_empty(x, shape.z, dtype);
  Tensor mean = statistic(x, shape.z), rstd = statistic(x, shape.z);
  x = map(x);
  LayerNormForwardParams p{};
  p.op = LayerNormOp::kNorm;
  p.in_dtype = dtype_of(x);
  p.out_dtype = dtype_of(z);
  p.rows = shape.rows;
  p.weight_dtype = prepare_parameter(weight, p.rows);
  p.bias_dtype = prepare_parameter(bias, p.rows);
  p.eps = static_cast<float>(eps);
  p.x = data_of(x);
  p.weight = data(weight);
  p.bias = data(bias);
  p.z = z.mutable_data_ptr();
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  SWINKERNELS_CUDA_CHECK(cuda::layer_norm_forward(p, current.stream));
  return {z, mean, rstd};
}

// Allocates and returns dweight and dbias, which all backward ops have, and launches the kernel. The caller has set the
// other fields of p and keeps their tensors alive.
std::tuple<Tensor, Tensor> launch_backward(LayerNormBackwardParams& p, const Tensor& x, OptionalTensor weight,
                                           Tensor mean, Tensor rstd, bool needs_dweight, bool needs_dbias,
                                           const CurrentStream& current) {
  const auto sum = [&](bool needed) {
    return torch::stable::new_empty(x, {needed ? int64_t{p.rows.length} : int64_t{0}}, ScalarType::Float);
  };
  Tensor dweight = sum(needs_dweight), dbias = sum(needs_dbias);
  p.weight_dtype = prepare_parameter(weight, p.rows);
  p.weight = data(weight);
  STD_TORCH_CHECK(mean.numel() == p.rows.count && rstd.numel() == p.rows.count &&
                      mean.scalar_type() == ScalarType::Float && rstd.scalar_type() == ScalarType::Float,
                  "swinkernels: mean and rstd must be float32, one value for each row");
  mean = as_contiguous(mean);
  rstd = as_contiguous(rstd);
  p.mean = static_cast<const float*>(data_of(mean));
  p.rstd = static_cast<const float*>(data_of(rstd));
  p.dweight = floats(dweight);
  p.dbias = floats(dbias);
  Tensor workspace = torch::stable::new_empty(x, {cuda::layer_norm_backward_workspace_bytes(p)}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  SWINKERNELS_CUDA_CHECK(cuda::layer_norm_backward(p, current.stream));
  return {dweight, dbias};
}

Gradients norm_backward(Tensor dz, Tensor x, OptionalTensor weight, Tensor mean, Tensor rstd, const NormShape& shape,
                        bool needs_dweight, bool needs_dbias) {
  const CurrentStream current(x);
  STD_TORCH_CHECK(sizes(dz, dz.dim()) == shape.z, "swinkernels: dz must have the shape of z");
  Tensor dx = torch::stable::new_empty(x, sizes(x, x.dim()));
  x = map(x);
  dz = map(dz);
  LayerNormBackwardParams p{};
  p.op = LayerNormOp::kNorm;
  p.in_dtype = dtype_of(x);
  p.out_dtype = dtype_of(dz);
  p.rows = shape.rows;
  p.normalised = data_of(x);
  p.dz = data_of(dz);
  p.dx = dx.mutable_data_ptr();
  const auto [dweight, dbias] = launch_backward(p, x, weight, mean, rstd, needs_dweight, needs_dbias, current);
  return {dx, dweight, dbias};
}

Norm patch_merging_norm_fwd(Tensor x, OptionalTensor weight, OptionalTensor bias, Ints factor, Ints neighbours,
                            double eps, ScalarType dtype) {
  return norm_forward(x, weight, bias, merged(x, factor, neighbours), eps, dtype);
}

Gradients patch_merging_norm_bwd(Tensor dz, Tensor x, OptionalTensor weight, Tensor mean, Tensor rstd, Ints factor,
                                 Ints neighbours, bool needs_dweight, bool needs_dbias) {
  return norm_backward(dz, x, weight, mean, rstd, merged(x, factor, neighbours), needs_dweight, needs_dbias);
}

Norm layer_norm_fwd(Tensor x, OptionalTensor weight, OptionalTensor bias, Ints factor, double eps, ScalarType dtype) {
  return norm_forward(x, weight, bias, plain_or_expanded(x, factor), eps, dtype);
}

Gradients layer_norm_bwd(Tensor dz, Tensor x, OptionalTensor weight, Tensor mean, Tensor rstd, Ints factor,
                         bool needs_dweight, bool needs_dbias) {
  return norm_backward(dz, x, weight, mean, rstd, plain_or_expanded(x, factor), needs_dweight, needs_dbias);
}

// Runs one of the two residual ops; returns mean and rstd.
std::tuple<Tensor, Tensor> residual_forward(LayerNormOp op, Tensor x, Tensor y, OptionalTensor scale,
                                            OptionalTensor weight, OptionalTensor bias, double eps, const Tensor& s,
                                            void* z) {
  const CurrentStream current(x);
  check_same_shape(x, y);
  const std::vector<int64_t> shape = sizes(x, x.dim());
  Tensor mean = statistic(x, shape), rstd = statistic(x, shape);
  x = map(x);
  y = map(y);
  LayerNormForwardParams p{};
  p.op = op;
  p.in_dtype = dtype_of(x);
  p.out_dtype = dtype_of(y);
  p.rows = plain_rows(shape);
  prepare_drop_path(p, scale, x);
  p.weight_dtype = prepare_parameter(weight, p.rows);
  p.bias_dtype = prepare_parameter(bias, p.rows);
  p.eps = static_cast<float>(eps);
  p.x = data_of(x);
  p.y = data_of(y);
  p.weight = data(weight);
  p.bias = data(bias);
  p.s = s.mutable_data_ptr();
  p.z = z;
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  SWINKERNELS_CUDA_CHECK(cuda::layer_norm_forward(p, current.stream));
  return {mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_fwd(Tensor x, Tensor y, OptionalTensor drop_path_scale,
                                                                   OptionalTensor weight, OptionalTensor bias,
                                                                   double eps) {
  Tensor s = torch::stable::new_empty(x, sizes(x, x.dim())), z = torch::stable::new_empty(y, sizes(y, y.dim()));
  const auto [mean, rstd] =
      residual_forward(LayerNormOp::kResidual, x, y, drop_path_scale, weight, bias, eps, s, z.mutable_data_ptr());
  return {s, z, mean, rstd};
}

Norm residual_post_norm_fwd(Tensor x, Tensor y, OptionalTensor drop_path_scale, OptionalTensor weight,
                            OptionalTensor bias, double eps) {
  Tensor s = torch::stable::new_empty(x, sizes(x, x.dim()));
  const auto [mean, rstd] =
      residual_forward(LayerNormOp::kPostNorm, x, y, drop_path_scale, weight, bias, eps, s, nullptr);
  return {s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_bwd(Tensor ds, Tensor dz, Tensor s,
                                                                   OptionalTensor drop_path_scale,
                                                                   OptionalTensor weight, Tensor mean, Tensor rstd,
                                                                   bool needs_dweight, bool needs_dbias) {
  const CurrentStream current(s);
  check_same_shape(s, ds);
  check_same_shape(s, dz);
  STD_TORCH_CHECK(dtype_of(ds) == dtype_of(s), "swinkernels: ds must have the dtype of s");
  const std::vector<int64_t> shape = sizes(s, s.dim());
  const bool dy_is_dx = !drop_path_scale && dtype_of(dz) == dtype_of(s);
  Tensor dx = torch::stable::new_empty(s, shape);
  Tensor dy = torch::stable::new_empty(dz, dy_is_dx ? std::vector<int64_t>{0} : shape);
  ds = map(ds);
  dz = map(dz);
  s = map(s);
  LayerNormBackwardParams p{};
  p.op = LayerNormOp::kResidual;
  p.in_dtype = dtype_of(s);
  p.out_dtype = dtype_of(dz);
  p.rows = plain_rows(shape);
  prepare_drop_path(p, drop_path_scale, s);
  p.normalised = data_of(s);
  p.dz = data_of(dz);
  p.ds = data_of(ds);
  p.dx = dx.mutable_data_ptr();
  p.dy = dy_is_dx ? nullptr : dy.mutable_data_ptr();
  const auto [dweight, dbias] = launch_backward(p, s, weight, mean, rstd, needs_dweight, needs_dbias, current);
  return {dx, dy, dweight, dbias};
}

Gradients residual_post_norm_bwd(Tensor ds, Tensor y, OptionalTensor drop_path_scale, OptionalTensor weight,
                                 Tensor mean, Tensor rstd, bool needs_dweight, bool needs_dbias) {
  const CurrentStream current(y);
  check_same_shape(y, ds);
  const std::vector<int64_t> shape = sizes(y, y.dim());
  Tensor dy = torch::stable::new_empty(y, shape);
  ds = map(ds);
  y = map(y);
  LayerNormBackwardParams p{};
  p.op = LayerNormOp::kPostNorm;
  p.in_dtype = dtype_of(ds);
  p.out_dtype = dtype_of(y);
  p.rows = plain_rows(shape);
  prepare_drop_path(p, drop_path_scale, y);
  p.normalised = data_of(y);
  p.ds = data_of(ds);
  p.dy = dy.mutable_data_ptr();
  const auto [dweight, dbias] = launch_backward(p, y, weight, mean, rstd, needs_dweight, needs_dbias, current);
  return {dy, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, SWINKERNELS_CUDA_KEY, m) {
  m.impl("patch_merging_norm_fwd", TORCH_BOX(&patch_merging_norm_fwd));
  m.impl("patch_merging_norm_bwd", TORCH_BOX(&patch_merging_norm_bwd));
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("residual_layer_norm_fwd", TORCH_BOX(&residual_layer_norm_fwd));
  m.impl("residual_layer_norm_bwd", TORCH_BOX(&residual_layer_norm_bwd));
  m.impl("residual_post_norm_fwd", TORCH_BOX(&residual_post_norm_fwd));
  m.impl("residual_post_norm_bwd", TORCH_BOX(&residual_post_norm_bwd));
}

}  // namespace
}  // namespace swinkernels
#endif
