// The workspace of the backward launches.
#pragma once

#include <cstdint>

namespace swinkernels::cuda {

// The dbias of a long window takes N * N floats for each worker of a unit. The number of workers is limited to as many
// as fit into this size, but is at least one.
constexpr int64_t kMostDenseBytes = int64_t{64} << 20;

// Allocates parts of a workspace of floats, or counts the floats that are needed.
struct WorkspaceArena {
  float* next;  // if null, floats are only counted
  int64_t count = 0;

  float* take(int64_t floats) {
    count += floats;
    if (next == nullptr || floats == 0) return nullptr;
    float* const taken = next;
    next += floats;
    return taken;
  }
};

}  // namespace swinkernels::cuda
