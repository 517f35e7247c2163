#include "machine.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace swinkernels::cpu {
namespace {

const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAmx:
      return "amx";
    case InstructionSet::kAvx512BFloat16:
      return "avx512_bf16";
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kEmulatedAmx:
      return "emulated_amx";
    default:
      return "baseline";
  }
}

#ifdef __x86_64__
// Returns true if the CPU has AMX's products of bfloat16 and this process may use them: Linux gives a process access to
// the tile registers only on request, and not if a thread has a signal stack that is too small for them.
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kBoth = kBFloat16 | kTile;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kBoth) != kBoth) return false;
  constexpr int64_t kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// The supported instruction sets, fastest first. `asked` is the set that the user named, or empty.
std::vector<InstructionSet> supported(const std::string& asked) {
  std::vector<InstructionSet> sets;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // Intel's CPUs have half as many products of bfloat16 a cycle, outside AMX, as of float32: on a Xeon with AMX turned
  // off, Swin-T took 1.4 times as long as with widened numbers.
  const bool intel = __builtin_cpu_is("intel");
  if (bfloat16 && (asked.empty() || asked == "amx") && has_amx()) sets.push_back(InstructionSet::kAmx);
  if (bfloat16 && !intel) sets.push_back(InstructionSet::kAvx512BFloat16);
  if (avx512) sets.push_back(InstructionSet::kAvx512);
  if (bfloat16 && intel) sets.push_back(InstructionSet::kAvx512BFloat16);
  if (avx2) sets.push_back(InstructionSet::kAvx2);
#endif
  sets.push_back(InstructionSet::kBaseline);
  sets.push_back(InstructionSet::kEmulatedAmx);
  return sets;
}

InstructionSet choose() {
  const char* variable = std::getenv("SWINKERNELS_CPU_ISA");
  const std::string asked = variable == nullptr ? "" : variable;
  const auto sets = supported(asked);
  if (asked.empty()) return sets.front();
  for (const InstructionSet set : sets) {
    if (asked == name(set)) return set;
  }
  std::string names;
  for (const InstructionSet set : supported("")) names += (names.empty() ? "" : ", ") + std::string(name(set));
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
    case InstructionSet::kAmx:
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
    case InstructionSet::kEmulatedAmx:
      return kEmulatedAmxKernels;
#ifdef __x86_64__
    case InstructionSet::kAmx:
      return kAmxKernels;
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
