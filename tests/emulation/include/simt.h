// The SIMT engine: runs a CUDA kernel on the CPU, one fiber per CUDA thread. ../__init__.py builds and calls it.
//
// A block's fibers run one at a time. A fiber runs until it reaches a collective (a barrier, shuffle, vote, ldmatrix or
// mma) and waits there until every participating lane has arrived; the last one computes the result for all, and the
// fibers continue. The blocks of a grid run one after another, so no block may wait for another.
//
// A schedule seed other than 0 randomises the order of warps and lanes, and how far a warp runs ahead: a kernel without
// races gives the same bits with every seed.
//
// The engine reports deadlocks, lanes of a warp in different collectives, misaligned accesses, and accesses outside the
// buffers as errors of the launch; emulation_error() returns the message. Dynamic shared memory and the buffers of
// emulation_allocate() have inaccessible pages around them. Dynamic shared memory is NaN when a block starts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace emulation {

using Site = std::source_location;

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// One lane's arrival at a warp collective.
struct Collective {
  const char* name;
  uint32_t mask;   // participating lanes
  bool aligned;    // all lanes must execute the same instruction (PTX .aligned)
  void* operands;  // of this lane, on its stack
  void (*execute)(void* const (&operands)[kWarpSize], uint32_t mask);
  Site site;
};

void warp_collective(const Collective& collective);

enum class BlockVote { kNone, kAnd, kOr, kCount };
int block_barrier(BlockVote vote, bool predicate, const Site& site);

// Makes the launch fail with this message. Does not return if called from a kernel.
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

int lane_index();
uint32_t active_mask();
unsigned char* dynamic_shared_memory();

// cp.async of the calling thread: the destination becomes NaN at once, and receives the bytes at the wait for the
// copy's group. This reveals a missing wait or barrier, and a copy into a buffer that is still being read.
void async_copy(void* destination, const void* source, int bytes, bool valid, const Site& site);
void async_commit();
void async_wait(int groups_left);

struct LaunchShape {
  const void* kernel;
  unsigned grid[3], block[3];
  size_t dynamic_smem_bytes;
};
// Returns 0 or a cudaError_t.
int run_grid(const LaunchShape& shape, void (*kernel)(void* context), void* context);

int multiprocessors();        // emulated: few, so that persistent loops iterate
int shared_bytes_of_block();  // emulated: the maximum of dynamic shared memory for a launch

}  // namespace emulation
