// The Python module swinkernels._C, which gives the build information to programs that inspect an installation without
// torch. The package itself calls torch.ops.swinkernels.build_info instead.
#include <pybind11/pybind11.h>

#include "bindings/build_info.h"

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  module.doc() = "The build information of this installation of swinkernels.";
  module.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(swinkernels::build_info()); },
      "A dict of versions, architectures, sources and limits.");
}
