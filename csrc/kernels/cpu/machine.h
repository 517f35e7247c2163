// Gives the CPU kernels the instruction set to use, scratch memory, and tasks on several threads.
#pragma once

#include <cstdint>

#include "params/cpu.h"

namespace swinkernels::cpu {

enum class InstructionSet { kEmulatedAmx, kBaseline, kAvx2, kAvx512, kAvx512BFloat16, kAmx };

// Returns the instruction set to use; see instruction_set() in params/cpu.h.
InstructionSet chosen_instruction_set();

// Returns 64-byte aligned scratch memory, which each thread keeps between calls. On a small map, page faults of newly
// allocated memory would take longer than the computation.
void* scratch(int64_t bytes);

// 64-byte aligned memory for the maps between the steps of a call, which all threads may access. The calling thread
// keeps memory of at most kMostKept bytes between calls, so only one object exists at a time.
class MapMemory {
 public:
  static constexpr int64_t kMostKept = 16 << 20;
  explicit MapMemory(int64_t bytes);
  ~MapMemory();
  MapMemory(const MapMemory&) = delete;
  MapMemory& operator=(const MapMemory&) = delete;
  template <class Element>
  Element* as() const {
    return static_cast<Element*>(data_);
  }

 private:
  void* data_;
  bool is_kept_;
};

// Calls body(begin, end) in parallel for ranges that together cover [0, tasks).
template <class Body>
void run(ParallelFor parallel_for, int64_t tasks, Body body) {
  parallel_for(
      tasks, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace swinkernels::cpu
