// Runs the package that export.py has written to FOLDER, without Python: `run LIBRARY FOLDER`. LIBRARY is the op
// library of swinkernels, swinkernels/_ops.abi3.so. Loading it registers the ops with torch's dispatcher, in which the
// package looks them up. The library does not need Python and may be copied to another folder.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read_floats(const std::string& path, at::IntArrayRef sizes) {
  at::Tensor values = at::empty(sizes, at::kFloat);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(values.data_ptr()), values.nbytes())) {
    throw std::runtime_error(path + " is missing or shorter than sizes.txt says: run export.py again");
  }
  return values;
}

void run(const std::string& library, const std::string& folder) {
  if (dlopen(library.c_str(), RTLD_NOW) == nullptr) {
    throw std::runtime_error(dlerror());
  }
  torch::inductor::AOTIModelPackageLoader model(folder + "/swin.pt2");

  int64_t batch = 0, height = 0, width = 0, classes = 0;
  std::ifstream(folder + "/sizes.txt") >> batch >> height >> width >> classes;
  const at::Tensor images = read_floats(folder + "/images.f32", {batch, 3, height, width});
  const at::Tensor expected = read_floats(folder + "/logits.f32", {batch, classes});

  const c10::InferenceMode no_gradients;
  for (int64_t n = 1; n <= batch; ++n) {  // the batch is dynamic
    const at::Tensor logits = model.run({images.narrow(0, 0, n)}).at(0);
    const double difference = (logits - expected.narrow(0, 0, n)).abs().max().item<double>();
    std::printf("batch %d: the logits differ by at most %.1e of %.1e\n", static_cast<int>(n), difference,
                expected.abs().max().item<double>());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s swinkernels/_ops.abi3.so FOLDER\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argv[2]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
