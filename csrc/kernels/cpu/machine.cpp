#include "machine.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace swinkernels::cpu {
namespace {

const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx512BFloat16:
      return "avx512_bf16";
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

// The supported instruction sets, best first.
std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(InstructionSet::kAvx512BFloat16);
  if (avx512) sets.push_back(InstructionSet::kAvx512);
  if (avx2) sets.push_back(InstructionSet::kAvx2);
#endif
  sets.push_back(InstructionSet::kBaseline);
  return sets;
}

InstructionSet choose() {
  const auto sets = supported();
  const char* asked = std::getenv("SWINKERNELS_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return sets.front();
  std::string names;
  for (const InstructionSet set : sets) {
    if (std::strcmp(asked, name(set)) == 0) return set;
    names += (names.empty() ? "" : ", ") + std::string(name(set));
  }
  throw std::invalid_argument("SWINKERNELS_CPU_ISA must be an instruction set that this machine supports (" + names +
                              "), got " + asked);
}

void* allocate(int64_t bytes) { return ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64}); }
void release(void* p) { ::operator delete(p, std::align_val_t{64}); }

// Memory that grows and is freed at the end of the thread.
class Kept {
 public:
  ~Kept() { release(data_); }
  void* at_least(int64_t bytes) {
    if (capacity_ < bytes) {
      release(data_);
      data_ = nullptr;
      capacity_ = 0;
      data_ = allocate(bytes);
      capacity_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace

InstructionSet chosen_instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const Kernels& kernels() {
  switch (chosen_instruction_set()) {
#ifdef __x86_64__
    case InstructionSet::kAvx512BFloat16:
    case InstructionSet::kAvx512:
      return kAvx512Kernels;
    case InstructionSet::kAvx2:
      return kAvx2Kernels;
#endif
    default:
      return kBaselineKernels;
  }
}

template <>
const LayerKernels<float>& layer_kernels() {
  return kernels().layers;
}

template <>
const LayerKernels<uint16_t>& layer_kernels() {
  switch (chosen_instruction_set()) {
#ifdef __x86_64__
    case InstructionSet::kAvx512BFloat16:
      return kAvx512BFloat16Kernels;
    case InstructionSet::kAvx512:
      return kAvx512WidenedKernels;
    case InstructionSet::kAvx2:
      return kAvx2WidenedKernels;
#endif
    default:
      return kBaselineBFloat16Kernels;
  }
}

const char* instruction_set() { return name(chosen_instruction_set()); }

void* scratch(int64_t bytes) {
  thread_local Kept memory;
  return memory.at_least(bytes);
}

MapMemory::MapMemory(int64_t bytes) : is_kept_(bytes <= kMostKept) {
  thread_local Kept memory;
  data_ = is_kept_ ? memory.at_least(bytes) : allocate(bytes);
}

MapMemory::~MapMemory() {
  if (!is_kept_) release(data_);
}

}  // namespace swinkernels::cpu
