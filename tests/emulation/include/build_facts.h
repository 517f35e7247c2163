// Replaces the header that setup.py writes for a real build.
#define SWINKERNELS_NAMESPACE swinkernels
#define SWINKERNELS_BUILD_FACTS                                                                              \
  R"({"version": "emulated", "torch_version": "", "torch_cuda": null, "cuda": true, "cuda_missing": null, )" \
  R"("cuda_version": null, "arch_list": ["8.0"], "cuda_sources": []})"
