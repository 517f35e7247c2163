// Implements cpu_instruction_set, which the emulated library would otherwise lack because it is built without the CPU
// kernels.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

std::string cpu_instruction_set() { return "emulated"; }

STABLE_TORCH_LIBRARY_IMPL(swinkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}

}  // namespace
