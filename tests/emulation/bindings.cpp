// Implements cpu_instruction_set, the only op of the CPU kernels that every library has.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

std::string cpu_instruction_set() { return "emulated"; }

STABLE_TORCH_LIBRARY_IMPL(swinkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
}

}  // namespace
