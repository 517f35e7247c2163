// Build information as a JSON object: sources, compiler and limits. This header depends neither on torch nor on Python,
// because both a torch op and a Python module include it.
#pragma once

#include <string>

#include "build_facts.h"  // SWINKERNELS_BUILD_FACTS, the facts known to setup.py: a JSON object
#ifdef SWINKERNELS_WITH_CUDA
#include "params/layer_norm_cuda.h"
#include "params/window_attention_cuda.h"
#endif

namespace swinkernels {

inline std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The instruction sets of the CPU kernels; one that the processor supports is chosen at run time.
inline const char* cpu_instruction_sets() {
#if defined(__x86_64__)
  return R"(["baseline", "emulated_amx", "avx2", "avx512", "avx512_bf16", "amx"])";
#else
  return R"(["baseline", "emulated_amx"])";
#endif
}

// JSON's true if the library was built with the CPU kernels of window attention and of Linear layers.
inline const char* has_cpu_kernels() {
#ifdef SWINKERNELS_WITHOUT_CPU
  return "false";
#else
  return "true";
#endif
}

#ifdef SWINKERNELS_WITH_CUDA
inline std::string entry(const char* name, int32_t value) {
  return std::string("\"") + name + "\": " + std::to_string(value);
}
#endif

// The limits of an op's CUDA kernels; null without CUDA.
inline std::string window_attention_limits() {
#ifdef SWINKERNELS_WITH_CUDA
  return "{" + entry("max_window_volume", cuda::kMaxWindowVolume) + ", " + entry("max_head_dim", cuda::kMaxHeadDim) +
         ", " + entry("shared_bytes_of_longest", cuda::kSharedBytesOfLongest) + ", " +
         entry("max_window_volume_in_less", cuda::kMaxWindowVolumeInLess) + ", " +
         entry("max_axis_tables_window", cuda::kMaxAxisTablesWindow) + ", " +
         entry("max_axis_tables_head_dim", cuda::kMaxAxisTablesHeadDim) + ", " +
         entry("max_axis_tables_volume_in_less", cuda::kMaxAxisTablesVolumeInLess) + "}";
#else
  return "null";
#endif
}

inline std::string layer_norm_limits() {
#ifdef SWINKERNELS_WITH_CUDA
  return "{" + entry("max_row", cuda::kMaxRow) + "}";
#else
  return "null";
#endif
}

inline std::string build_info() {
  const std::string facts = SWINKERNELS_BUILD_FACTS;
  return facts.substr(0, facts.rfind('}')) + ", \"compiler\": \"" + compiler() +
         "\", \"has_cpu_kernels\": " + has_cpu_kernels() + ", \"cpu_instruction_sets\": " + cpu_instruction_sets() +
         ", \"window_attention_limits\": " + window_attention_limits() +
         ", \"layer_norm_limits\": " + layer_norm_limits() + "}";
}

}  // namespace swinkernels
