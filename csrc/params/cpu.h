// Declarations that the CPU kernels of all ops use.
#pragma once

#include <cstdint>

namespace swinkernels::cpu {

// Runs body(context, begin, end) over [0, tasks) on the caller's thread pool.
using ParallelFor = void (*)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);

// Returns the instruction set that the kernels use on this machine: "amx", "avx512_bf16", "avx512", "avx2", "baseline"
// or "emulated_amx". This is the fastest supported one, unless the environment variable SWINKERNELS_CPU_ISA, which is
// read once, names another. This function and the functions that run kernels throw std::invalid_argument if the machine
// does not support the named set.
const char* instruction_set();

}  // namespace swinkernels::cpu
