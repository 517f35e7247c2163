// Registers the op build_info with torch's stable ABI, so it is available wherever the kernels can be loaded.
#include "build_info.h"

#include <torch/csrc/stable/library.h>

namespace swinkernels {
namespace {

STABLE_TORCH_LIBRARY_IMPL(SWINKERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace
}  // namespace swinkernels
