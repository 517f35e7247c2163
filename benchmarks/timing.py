"""Time calls: with CUDA graph replays or CUDA events on a GPU, with a clock on a CPU."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# A call accepts the index of the input set to read, and returns its outputs.
Call = Callable[[int], Any]
NOISY = 0.1  # relative spread above which a time is unreliable
ATTEMPTS = 3  # maximum number of measurements if times are noisy


@dataclass(frozen=True)
class Timing:
    """The time of one call in microseconds: the median and the 20th and 80th percentiles."""

    median_us: float
    p20_us: float
    p80_us: float

    @classmethod
    def of(cls, samples_us: list[float]) -> Timing:
        p20, _, _, p80 = statistics.quantiles(samples_us, n=5, method="inclusive")
        return cls(statistics.median(samples_us), p20, p80)

    @property
    def spread(self) -> float:
        return (self.p80_us - self.p20_us) / max(self.median_us, 1e-9)

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


def until_steady(measure: Callable[[], dict[str, Timing]]) -> dict[str, Timing]:
    """Measure up to ATTEMPTS times, until no time is noisy; return the measurement with the smallest spread.

    All contestants are measured again, and only the times of a single measurement are returned, because contestants are
    compared with each other.
    """

    def widest(times: Mapping[str, Timing]) -> float:
        return max((t.spread for t in times.values()), default=0.0)

    best = measure()
    for _ in range(ATTEMPTS - 1):
        if widest(best) <= NOISY:
            break
        best = min(best, measure(), key=widest)
    return best


@dataclass(frozen=True)
class Ceiling:
    """The device's measured rates: of a large copy, counting bytes read and written, and of a large matrix product."""

    bytes_per_us: float
    flops_per_us: float

    def roofline_us(self, moved: int, flops: int) -> float:
        """Return the lower bound that memory and arithmetic set on the time."""
        return max(moved / self.bytes_per_us, flops / self.flops_per_us)


def ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Return the ceiling, measured once per device, dtype, number of threads and setting of torch's TF32 switch."""
    return _ceiling(device, dtype, torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision)


@functools.cache
def _ceiling(device: torch.device, dtype: torch.dtype, threads: int, precision: str) -> Ceiling:
    on_gpu = device.type == "cuda"
    count, size = (2**29, 8192) if on_gpu else (2**27, 1024)  # bytes; rows of a square matrix
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    calls: dict[str, Call] = {"copy": lambda i: target.copy_(source), "product": lambda i: a @ b}
    times = time_steps(calls, device, rounds=15) if on_gpu else time_on_cpu(calls, seconds=0.5)
    return Ceiling(2 * count / times["copy"].median_us, 2 * size**3 / times["product"].median_us)


def input_sets(bytes_per_call: int, device: torch.device) -> int:
    """Return a number of input sets that exceed a GPU's L2 cache, so no call finds its inputs there; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(3 * cache / max(bytes_per_call, 1)))


class GraphTimer:
    """Times calls in CUDA graphs on one stream; tensors that the calls cache must be created on the same stream."""

    def __init__(self, device: torch.device, *, replays: int = 25, replay_ms: float = 2.0) -> None:
        self.stream = torch.cuda.Stream(device)
        self.replays, self.replay_ms = replays, replay_ms

    def __call__(self, call: Call, sets: int) -> Timing:
        return Timing.of(self.samples(call, sets, self.replays))

    def samples(self, call: Call, sets: int, replays: int) -> list[float]:
        """Return the mean time of one call in microseconds, for each replay."""
        self.stream.wait_stream(torch.cuda.current_stream())
        # Each output is kept until its input set is used again; otherwise the allocator would reuse memory that is
        # still in the L2 cache.
        held: list[Any] = [None] * sets
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def run(count: int) -> None:
            for i in range(count):
                held[i % sets] = call(i % sets)

        with torch.cuda.stream(self.stream):
            run(max(3, sets))  # compiles, fills caches
            start.record()
            run(sets)
            end.record()
        end.synchronize()
        calls = sets * max(1, math.ceil(self.replay_ms / max(start.elapsed_time(end), 1e-3)))
        graph = torch.cuda.CUDAGraph()
        held[:] = [None] * sets
        with torch.cuda.graph(graph, stream=self.stream):
            run(calls)
        found = []
        with torch.cuda.stream(self.stream):
            for i in range(replays + 3):
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                if i >= 3:
                    found.append(start.elapsed_time(end) * 1e3 / calls)
        return found


def time_steps(calls: Mapping[str, Call], device: torch.device, *, rounds: int = 30) -> dict[str, Timing]:
    """Time long calls on a GPU with CUDA events, including host time if it dominates.

    The calls take turns, and the L2 cache is overwritten before each call.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(3 * cache, dtype=torch.uint8, device=device)

    def measure() -> dict[str, Timing]:
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 3):
            for name, call in calls.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.zero_()
                torch.cuda.synchronize(device)
                start.record()
                call(0)
                end.record()
                end.synchronize()
                if turn >= 3:
                    samples[name].append(start.elapsed_time(end) * 1e3)
        return {name: Timing.of(values) for name, values in samples.items()}

    return until_steady(measure)


def gpu_busy_us(call: Call, device: torch.device) -> float:
    """Return the time of a call's kernels and copies, without the gaps between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(0)
        torch.cuda.synchronize(device)
    return float(sum(event.self_device_time_total for event in profile.key_averages()))


def host_us(call: Call, device: torch.device, *, loop: int = 10) -> float:
    """Return the calling thread's CPU time per call in microseconds, without waiting for the GPU."""
    start = time.thread_time()
    for _ in range(loop):
        call(0)
    spent = time.thread_time() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return spent * 1e6 / loop


# The clock for times on a CPU, in seconds: the wall clock, or the CPU time of all threads of this process.
CPU_CLOCK = [time.perf_counter]


def time_on_cpu(calls: Mapping[str, Call], *, seconds: float = 1.5, rounds: int = 11) -> dict[str, Timing]:
    """Return the times of all calls; the calls take turns, so that a slow moment of the machine affects all of them."""
    (clock,) = CPU_CLOCK
    once = {}
    for name, call in calls.items():
        call(0)
        start = clock()
        call(0)
        once[name] = clock() - start
    repeats = {name: max(1, int(seconds / rounds / max(spent, 1e-6))) for name, spent in once.items()}

    def measure() -> dict[str, Timing]:
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = clock()
                for _ in range(repeats[name]):
                    call(0)
                samples[name].append((clock() - start) * 1e6 / repeats[name])
        return {name: Timing.of(values) for name, values in samples.items()}

    return until_steady(measure)
