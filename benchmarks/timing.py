"""How a call is timed: by replays of a CUDA graph on a GPU, by the wall clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# A call is given the number of the input set that it shall read, and returns what it wrote.
Call = Callable[[int], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median, and the 20th and 80th percentile."""

    median_us: float
    p20_us: float
    p80_us: float

    @classmethod
    def of(cls, samples_us: list[float]) -> Timing:
        p20, _, _, p80 = statistics.quantiles(samples_us, n=5, method="inclusive")
        return cls(statistics.median(samples_us), p20, p80)


def input_sets(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of inputs are needed so that none is still in the L2 cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(3 * cache / max(bytes_per_call, 1)))


class GraphTimer:
    """Times calls on one stream, where whatever they replay must also have been made."""

    def __init__(self, device: torch.device, *, replays: int = 25, replay_ms: float = 2.0) -> None:
        self.stream = torch.cuda.Stream(device)
        self.replays, self.replay_ms = replays, replay_ms

    def __call__(self, call: Call, sets: int) -> Timing:
        self.stream.wait_stream(torch.cuda.current_stream())
        held: list[Any] = [None] * sets  # outputs rotate like the inputs, instead of one staying in the cache
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
        samples = []
        with torch.cuda.stream(self.stream):
            for i in range(self.replays + 3):
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                if i >= 3:
                    samples.append(start.elapsed_time(end) * 1e3 / calls)
        return Timing.of(samples)


def time_on_cpu(calls: dict[str, Call], *, seconds: float = 1.0, rounds: int = 7) -> dict[str, Timing]:
    """Wall-clock times of all calls, taken in turns so that a slow moment of the machine meets them alike."""
    once = {}
    for name, call in calls.items():
        call(0)
        start = time.perf_counter()
        call(0)
        once[name] = time.perf_counter() - start
    repeats = {name: max(1, int(seconds / rounds / max(spent, 1e-6))) for name, spent in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call(0)
            samples[name].append((time.perf_counter() - start) * 1e6 / repeats[name])
    return {name: Timing.of(values) for name, values in samples.items()}
