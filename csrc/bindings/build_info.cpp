// swinkernels._C: what was compiled, by what and for what. Knows nothing of torch, so it loads under any.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#ifdef SWINKERNELS_WITH_CUDA
#include "params/layer_norm_cuda.h"
#include "params/window_attention_cuda.h"
#endif

namespace py = pybind11;

namespace {

std::vector<std::string> split(const char* text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ';');) parts.push_back(part);
  return parts;
}

std::optional<std::string> unless_empty(const char* text) {
  return *text ? std::optional<std::string>(text) : std::nullopt;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// What the CPU kernels are compiled for; the processor chooses among them at run time.
std::vector<std::string> cpu_instruction_sets() {
#if defined(__x86_64__)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

// What the CUDA kernels of an op accept; None without CUDA.
py::object window_attention_limits() {
#ifdef SWINKERNELS_WITH_CUDA
  using namespace py::literals;
  return py::dict("max_window_volume"_a = swinkernels::cuda::kMaxWindowVolume,
                  "max_head_dim"_a = swinkernels::cuda::kMaxHeadDim,
                  "shared_bytes_of_longest"_a = swinkernels::cuda::kSharedBytesOfLongest,
                  "max_window_volume_in_less"_a = swinkernels::cuda::kMaxWindowVolumeInLess);
#else
  return py::none();
#endif
}

py::object layer_norm_limits() {
#ifdef SWINKERNELS_WITH_CUDA
  using namespace py::literals;
  return py::dict("max_row"_a = swinkernels::cuda::kMaxRow);
#else
  return py::none();
#endif
}

py::dict build_info() {
  using namespace py::literals;
  const auto nvcc = unless_empty(SWINKERNELS_NVCC_VERSION);
  return py::dict("version"_a = SWINKERNELS_VERSION, "torch_version"_a = SWINKERNELS_TORCH_VERSION,
                  "torch_cuda"_a = unless_empty(SWINKERNELS_TORCH_CUDA), "compiler"_a = compiler(),
                  "cuda"_a = nvcc.has_value(), "cuda_missing"_a = unless_empty(SWINKERNELS_CUDA_MISSING),
                  "cuda_version"_a = nvcc, "arch_list"_a = split(SWINKERNELS_ARCH_LIST),
                  "cuda_sources"_a = split(SWINKERNELS_CUDA_SOURCES), "cpu_instruction_sets"_a = cpu_instruction_sets(),
                  "window_attention_limits"_a = window_attention_limits(), "layer_norm_limits"_a = layer_norm_limits());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What was compiled into this installation of swinkernels.";
  module.def("build_info", &build_info, "A dict of versions, architectures, sources and limits.");
}
