// The engine behind include/simt.h.
#include "simt.h"

#include <cuda_runtime.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kPoison = 0xff;  // NaN in every floating type of the kernels
constexpr int kSmemAlignment = 128;
constexpr size_t kMaxDynamicSmemBytes = 227 * 1024;
constexpr int kMaxThreads = 1024;

// Switching stacks takes a dozen instructions on x86-64. Elsewhere, ucontext makes a system call for each switch.
#if defined(__x86_64__)
using Context = void*;
extern "C" void swinkernels_emulation_switch(void** save, void* load);
asm(R"(
.text
.local swinkernels_emulation_switch
.type swinkernels_emulation_switch, @function
swinkernels_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size swinkernels_emulation_switch, .-swinkernels_emulation_switch
)");

void switch_context(Context& save, Context& load) { swinkernels_emulation_switch(&save, load); }

void make_context(Context& context, unsigned char* stack, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // the return address of entry, which never returns; also aligns its stack
  *--top = reinterpret_cast<void*>(entry);
  top -= kSavedRegisters;
  std::fill(top, top + kSavedRegisters, nullptr);
  context = top;
}
#else
using Context = ucontext_t;
void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }

void make_context(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State : uint8_t { kRunnable, kInWarpCollective, kInBlockBarrier, kExited };

struct Copy {
  void* destination;
  const void* source;
  int bytes;
  bool valid;
};

struct Lane {
  Context context;
  unsigned char* stack = nullptr;
  State state = State::kExited;
  uint3 thread;
  int index;  // within the block
  Collective collective;
  BlockVote vote;
  bool predicate;
  Site site;
  std::vector<Copy> copies;    // issued but not completed, oldest first
  std::vector<size_t> groups;  // for each committed group, the number of copies up to its end
};

struct GuardedMapping {
  unsigned char* base;
  size_t length;
};

constexpr size_t kLaunchesKept = 64;

struct Engine {
  std::vector<Lane> lanes;  // kept between launches, to reuse their stacks
  int threads = 0;
  int alive = 0;
  std::vector<uint32_t> waiting;  // per warp, the lanes in a warp collective
  int in_barrier = 0;
  int barrier_result = 0;
  Lane* current = nullptr;
  Context scheduler;
  void (*kernel)(void*) = nullptr;
  void* kernel_context = nullptr;
  unsigned char* smem = nullptr;
  size_t smem_bytes = 0;
  bool failed = false;
  std::string error;
  int multiprocessors = 2;
  int shared_bytes = kMaxDynamicSmemBytes;  // the maximum dynamic shared memory of a launch
  std::deque<LaunchShape> launches;         // the last kLaunchesKept that emulation_next_launch() has not returned
  uint64_t seed = 0;
  std::map<void*, GuardedMapping> allocations;
};
Engine engine;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Allocates memory filled with NaN that ends (up to alignment) at an inaccessible page and follows another such page.
void* allocate_guarded(size_t bytes, size_t alignment) {
  const size_t page = page_bytes();
  const size_t padded = (bytes + alignment - 1) / alignment * alignment;
  const size_t data = (padded + page - 1) / page * page;
  const size_t length = data + 2 * page;
  auto base =
      static_cast<unsigned char*>(mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED) return nullptr;
  if (data != 0) {
    mprotect(base + page, data, PROT_READ | PROT_WRITE);
    memset(base + page, kPoison, data);
  }
  unsigned char* result = base + page + data - padded;
  engine.allocations[result] = {base, length};
  return result;
}

void free_guarded(void* pointer) {
  const auto found = engine.allocations.find(pointer);
  if (found == engine.allocations.end()) return;
  munmap(found->second.base, found->second.length);
  engine.allocations.erase(found);
}

std::string position(const Site& site) {
  const char* name = strrchr(site.file_name(), '/');
  return std::string(name ? name + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

Lane* warp_of(const Lane& lane) { return &engine.lanes[lane.index / kWarpSize * kWarpSize]; }
int lanes_in_warp(const Lane& lane) { return std::min(kWarpSize, engine.threads - lane.index / kWarpSize * kWarpSize); }

void switch_to_scheduler() {
  Lane* lane = engine.current;
  switch_context(lane->context, engine.scheduler);
}

bool complete_barrier_if_all_arrived() {
  if (engine.in_barrier == 0 || engine.in_barrier < engine.alive) return false;
  int count = 0;
  for (int i = 0; i < engine.threads; ++i) {
    const Lane& lane = engine.lanes[i];
    if (lane.state == State::kInBlockBarrier) count += lane.predicate;
  }
  for (int i = 0; i < engine.threads; ++i) {
    Lane& lane = engine.lanes[i];
    if (lane.state != State::kInBlockBarrier) continue;
    lane.state = State::kRunnable;
    switch (lane.vote) {
      case BlockVote::kAnd:
        engine.barrier_result = count == engine.in_barrier;
        break;
      case BlockVote::kOr:
        engine.barrier_result = count != 0;
        break;
      default:
        engine.barrier_result = count;
    }
  }
  engine.in_barrier = 0;
  return true;
}

void fiber_main() {
  engine.kernel(engine.kernel_context);
  engine.current->state = State::kExited;
  --engine.alive;
  complete_barrier_if_all_arrived();
  switch_to_scheduler();
}

void resume(Lane& lane) {
  engine.current = &lane;
  threadIdx = lane.thread;
  switch_context(engine.scheduler, lane.context);
  engine.current = nullptr;
}

// Runs each runnable lane of a warp to its next collective. Returns false if none could run.
bool run_warp_once(int warp, std::mt19937_64* random) {
  const int first = warp * kWarpSize, count = std::min(kWarpSize, engine.threads - first);
  const int start = random ? static_cast<int>((*random)() % count) : 0;
  const bool backwards = random && (*random)() % 2;
  bool progress = false;
  for (int i = 0; i < count && !engine.failed; ++i) {
    const int turn = (start + i) % count;
    Lane& lane = engine.lanes[first + (backwards ? count - 1 - turn : turn)];
    while (lane.state == State::kRunnable && !engine.failed) {
      resume(lane);
      progress = true;
    }
  }
  return progress;
}

void report_deadlock() {
  std::string text = "no thread of the block can go on:";
  for (int first = 0; first < engine.threads; first += kWarpSize) {
    std::map<std::string, int> waiting;
    for (int i = first; i < std::min(first + kWarpSize, engine.threads); ++i) {
      const Lane& lane = engine.lanes[i];
      if (lane.state == State::kInWarpCollective) {
        char mask[16];
        snprintf(mask, sizeof mask, "0x%08x", lane.collective.mask);
        waiting["wait in " + std::string(lane.collective.name) + " (mask " + mask + ") at " +
                position(lane.collective.site)]++;
      } else if (lane.state == State::kInBlockBarrier) {
        waiting["wait in __syncthreads at " + position(lane.site)]++;
      } else {
        waiting["have exited"]++;
      }
    }
    text += " warp " + std::to_string(first / kWarpSize) + ":";
    for (const auto& [what, lanes] : waiting) text += " " + std::to_string(lanes) + " lanes " + what + ";";
  }
  fail("%s", text.c_str());
}

void run_block(std::mt19937_64* random) {
  memset(engine.smem, kPoison, (engine.smem_bytes + kSmemAlignment - 1) / kSmemAlignment * kSmemAlignment);
  engine.alive = engine.threads;
  engine.in_barrier = 0;
  for (int i = 0; i < engine.threads; ++i) {
    Lane& lane = engine.lanes[i];
    lane.state = State::kRunnable;
    lane.index = i;
    const unsigned x = blockDim.x, y = blockDim.y, linear = static_cast<unsigned>(i);
    lane.thread = {linear % x, linear / x % y, linear / (x * y)};
    lane.copies.clear();
    lane.groups.clear();
    make_context(lane.context, lane.stack, fiber_main);
  }
  const int warps = (engine.threads + kWarpSize - 1) / kWarpSize;
  engine.waiting.assign(warps, 0);
  std::vector<int> order(warps);
  for (int w = 0; w < warps; ++w) order[w] = w;
  while (engine.alive != 0 && !engine.failed) {
    bool progress = false;
    if (random) std::shuffle(order.begin(), order.end(), *random);
    for (int warp : order) {
      constexpr int kMaxRounds = 16;
      int rounds = random ? 1 + static_cast<int>((*random)() % kMaxRounds) : -1;  // -1: without a limit
      while (rounds-- != 0 && run_warp_once(warp, random)) progress = true;
    }
    if (!progress && !engine.failed) report_deadlock();
  }
  const size_t slack = (kSmemAlignment - engine.smem_bytes % kSmemAlignment) % kSmemAlignment;
  for (size_t i = 0; i < slack && !engine.failed; ++i) {
    if (engine.smem[engine.smem_bytes + i] != kPoison) {
      fail("wrote %zu bytes past the %zu bytes of dynamic shared memory", i, engine.smem_bytes);
    }
  }
}

#if defined(__x86_64__) && defined(__linux__)
constexpr bool kCatchesFaults = true;
int fault_signal;
const void* fault_address;
const void* fault_instruction;

// A faulting fiber continues here.
void faulted() {
  const auto address = reinterpret_cast<uintptr_t>(fault_address);
  const auto smem = reinterpret_cast<uintptr_t>(engine.smem);
  if (fault_signal == SIGILL) {
    fail("misaligned vector access, array index out of range, or __trap (instruction %p)", fault_instruction);
  } else if (address + page_bytes() > smem && address < smem + engine.smem_bytes + page_bytes() + kSmemAlignment) {
    fail("access to byte %lld of the %zu bytes of dynamic shared memory",
         static_cast<long long>(address) - static_cast<long long>(smem), engine.smem_bytes);
  } else {
    for (const auto& [pointer, mapping] : engine.allocations) {
      const auto base = reinterpret_cast<uintptr_t>(mapping.base);
      if (address < base || address >= base + mapping.length) continue;
      const auto start = reinterpret_cast<uintptr_t>(pointer);
      fail("access to byte %lld of a global buffer of %lld bytes", static_cast<long long>(address - start),
           static_cast<long long>(base + mapping.length - page_bytes() - start));
    }
    fail("access to address %p, which is in no buffer", fault_address);
  }
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!engine.current) {  // not from a fiber: let it recur with the default action
    ::signal(signal, SIG_DFL);
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  fault_signal = signal;
  fault_address = info->si_addr;
  fault_instruction = reinterpret_cast<const void*>(registers[REG_RIP]);
  constexpr greg_t kRedZone = 128;
  registers[REG_RSP] = ((registers[REG_RSP] - kRedZone) & ~greg_t{15}) - 8;
  registers[REG_RIP] = reinterpret_cast<greg_t>(&faulted);
}

constexpr int kFaultSignals[] = {SIGSEGV, SIGBUS, SIGILL};
struct FaultHandlers {
  struct sigaction saved[3];
  FaultHandlers() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    for (int i = 0; i < 3; ++i) sigaction(kFaultSignals[i], &action, &saved[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 3; ++i) sigaction(kFaultSignals[i], &saved[i], nullptr);
  }
};
#else
constexpr bool kCatchesFaults = false;
struct FaultHandlers {
  FaultHandlers() {}
};
#endif

}  // namespace

void fail(const char* format, ...) {
  if (!engine.failed) {
    char text[2048], where[160] = "";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(where, sizeof where, "block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
    engine.error = where;
    if (engine.current) {
      const uint3& thread = engine.current->thread;
      snprintf(where, sizeof where, " thread (%u, %u, %u)", thread.x, thread.y, thread.z);
      engine.error += where;
    }
    engine.error += std::string(": ") + text;
    engine.failed = true;
  }
  if (engine.current) {
    switch_to_scheduler();  // the scheduler does not resume a failed launch
    __builtin_unreachable();
  }
}

int lane_index() { return engine.current->index % kWarpSize; }

uint32_t active_mask() {
  const Lane& lane = *engine.current;
  const Lane* warp = warp_of(lane);
  uint32_t mask = 0;
  for (int i = 0; i < lanes_in_warp(lane); ++i) mask |= (warp[i].state != State::kExited ? 1u : 0u) << i;
  return mask;
}

unsigned char* dynamic_shared_memory() { return engine.smem; }
int multiprocessors() { return engine.multiprocessors; }
int shared_bytes_of_block() { return engine.shared_bytes; }

void warp_collective(const Collective& collective) {
  Lane& lane = *engine.current;
  Lane* warp = warp_of(lane);
  const int self = lane.index % kWarpSize, count = lanes_in_warp(lane);
  uint32_t& waiting = engine.waiting[lane.index / kWarpSize];
  if (!(collective.mask >> self & 1)) {
    fail("%s at %s: lane %d is not in its own mask 0x%08x", collective.name, position(collective.site).c_str(), self,
         collective.mask);
  }
  lane.collective = collective;
  lane.state = State::kInWarpCollective;
  waiting |= 1u << self;
  // Lanes that wait for each other must be in the same collective. An arriving lane is compared with only one lane that
  // has arrived before it, because the last lane to arrive is compared with all others.
  const uint32_t arrived = collective.mask & waiting;
  const bool all_arrived = arrived == collective.mask;
  void* operands[kWarpSize] = {};
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(arrived >> i & 1) || (i == self && !all_arrived)) continue;
    const Collective& other = warp[i].collective;
    operands[i] = other.operands;
    if (other.mask >> self & 1) {
      if (other.execute != collective.execute || strcmp(other.name, collective.name) != 0 ||
          other.mask != collective.mask || (collective.aligned && !same_site(other.site, collective.site))) {
        fail(
            "lanes of one warp are in different collectives: lane %d in %s (mask 0x%08x) at %s, lane %d in %s (mask "
            "0x%08x) at %s",
            self, collective.name, collective.mask, position(collective.site).c_str(), i, other.name, other.mask,
            position(other.site).c_str());
      }
    } else if (all_arrived) {  // the other lane waits for different lanes first
      switch_to_scheduler();
      return;
    }
    if (!all_arrived) break;
  }
  if (!all_arrived) {
    for (int i = 0; i < kWarpSize; ++i) {
      if ((collective.mask >> i & 1) && (i >= count || warp[i].state == State::kExited)) {
        fail("%s at %s waits for lane %d, which %s", collective.name, position(collective.site).c_str(), i,
             i >= count ? "the block does not have" : "has exited");
      }
    }
    switch_to_scheduler();
    return;
  }
  for (int i = 0; i < count; ++i) {
    if (collective.mask >> i & 1) warp[i].state = State::kRunnable;
  }
  waiting &= ~collective.mask;
  collective.execute(operands, collective.mask);
}

int block_barrier(BlockVote vote, bool predicate, const Site& site) {
  Lane& lane = *engine.current;
  for (int i = 0; i < engine.threads && engine.in_barrier != 0; ++i) {
    const Lane& other = engine.lanes[i];
    if (other.state != State::kInBlockBarrier) continue;
    if (other.vote != vote || !same_site(other.site, site)) {
      fail("threads of one block are in different barriers: thread %d at %s, thread %d at %s", lane.index,
           position(site).c_str(), i, position(other.site).c_str());
    }
    break;  // all waiting lanes were compared on arrival
  }
  lane.state = State::kInBlockBarrier;
  lane.vote = vote;
  lane.predicate = predicate;
  lane.site = site;
  ++engine.in_barrier;
  if (!complete_barrier_if_all_arrived()) switch_to_scheduler();
  return engine.barrier_result;
}

void async_copy(void* destination, const void* source, int bytes, bool valid, const Site& site) {
  if (reinterpret_cast<uintptr_t>(destination) % bytes != 0) {
    fail("cp_async at %s: shared memory address is not a multiple of %d bytes", position(site).c_str(), bytes);
  }
  if (valid) {
    if (reinterpret_cast<uintptr_t>(source) % bytes != 0) {
      fail("cp_async at %s: global memory address is not a multiple of %d bytes", position(site).c_str(), bytes);
    }
    const volatile auto* first = static_cast<const volatile unsigned char*>(source);
    (void)first[0];  // an access outside the buffer is reported here, where it was issued
  }
  memset(destination, kPoison, bytes);
  engine.current->copies.push_back({destination, source, bytes, valid});
}

void async_commit() { engine.current->groups.push_back(engine.current->copies.size()); }

void async_wait(int groups_left) {
  Lane& lane = *engine.current;
  const auto left = static_cast<size_t>(groups_left);
  if (lane.groups.size() <= left) return;
  const size_t finished = lane.groups.size() - left, done = lane.groups[finished - 1];
  for (size_t i = 0; i < done; ++i) {
    const Copy& copy = lane.copies[i];
    if (copy.valid) {
      memcpy(copy.destination, copy.source, copy.bytes);
    } else {
      memset(copy.destination, 0, copy.bytes);
    }
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<ptrdiff_t>(done));
  lane.groups.erase(lane.groups.begin(), lane.groups.begin() + static_cast<ptrdiff_t>(finished));
  for (size_t& end : lane.groups) end -= done;
}

int run_grid(const LaunchShape& shape, void (*kernel)(void* context), void* context) {
  const uint64_t threads = uint64_t{shape.block[0]} * shape.block[1] * shape.block[2];
  constexpr unsigned kMaxGridYZ = 65535;
  engine.failed = false;
  engine.error.clear();
  if (threads == 0 || threads > kMaxThreads || shape.grid[0] == 0 || shape.grid[0] > INT32_MAX || shape.grid[1] == 0 ||
      shape.grid[1] > kMaxGridYZ || shape.grid[2] == 0 || shape.grid[2] > kMaxGridYZ) {
    engine.error = "launch with an impossible grid or block";
    return cudaErrorInvalidConfiguration;
  }
  if (shape.dynamic_smem_bytes > static_cast<size_t>(engine.shared_bytes)) {
    engine.error = "launch with " + std::to_string(shape.dynamic_smem_bytes) + " bytes of dynamic shared memory";
    return cudaErrorInvalidValue;
  }
  engine.launches.push_back(shape);
  if (engine.launches.size() > kLaunchesKept) engine.launches.pop_front();
  engine.threads = static_cast<int>(threads);
  if (engine.lanes.size() < threads) engine.lanes.resize(threads);
  for (Lane& lane : engine.lanes) {
    if (lane.stack) continue;
    const size_t page = page_bytes();
    auto base = static_cast<unsigned char*>(
        mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED) return cudaErrorMemoryAllocation;
    mprotect(base, page, PROT_NONE);  // detects a stack overflow
    lane.stack = base + page;
  }
  engine.kernel = kernel;
  engine.kernel_context = context;
  engine.smem_bytes = shape.dynamic_smem_bytes;
  engine.smem = static_cast<unsigned char*>(allocate_guarded(engine.smem_bytes, kSmemAlignment));
  if (!engine.smem) return cudaErrorMemoryAllocation;
  gridDim = dim3(shape.grid[0], shape.grid[1], shape.grid[2]);
  blockDim = dim3(shape.block[0], shape.block[1], shape.block[2]);
  std::mt19937_64 random(engine.seed);
  {
    FaultHandlers handlers;
    for (unsigned z = 0; z < gridDim.z && !engine.failed; ++z) {
      for (unsigned y = 0; y < gridDim.y && !engine.failed; ++y) {
        for (unsigned x = 0; x < gridDim.x && !engine.failed; ++x) {
          blockIdx = {x, y, z};
          run_block(engine.seed != 0 ? &random : nullptr);
        }
      }
    }
  }
  free_guarded(engine.smem);
  engine.smem = nullptr;
  return engine.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulation

#define EMULATION_EXPORT extern "C" __attribute__((visibility("default")))

EMULATION_EXPORT const char* emulation_error() { return emulation::engine.error.c_str(); }
EMULATION_EXPORT bool emulation_catches_faults() { return emulation::kCatchesFaults; }
EMULATION_EXPORT void emulation_configure(uint64_t schedule_seed, int multiprocessors, int shared_bytes) {
  emulation::engine.seed = schedule_seed;
  emulation::engine.multiprocessors = multiprocessors;
  emulation::engine.shared_bytes = shared_bytes;
}
// Fetches the oldest launch that has not been fetched yet; returns false if there is none.
EMULATION_EXPORT bool emulation_next_launch(const void** kernel, size_t* smem_bytes, int* threads) {
  auto& launches = emulation::engine.launches;
  if (launches.empty()) return false;
  const emulation::LaunchShape& shape = launches.front();
  *kernel = shape.kernel;
  *smem_bytes = shape.dynamic_smem_bytes;
  *threads = static_cast<int>(shape.block[0] * shape.block[1] * shape.block[2]);
  launches.pop_front();
  return true;
}
EMULATION_EXPORT void* emulation_allocate(size_t bytes, size_t alignment) {
  return emulation::allocate_guarded(bytes, alignment);
}
EMULATION_EXPORT void emulation_free(void* pointer) { emulation::free_guarded(pointer); }
