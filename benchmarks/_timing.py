"""Times calls in turn: host clock on the CPU, events around many launches on CUDA.

Below 100 us an event pair around one call times the gap between two launches, so a pair holds
many calls. `captured` puts calls into one CUDA graph, whose replay has no launch gaps; with one
call per set of tensors, and sets that together exceed the L2 cache, each call finds a cold cache.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
SPAN_MS = 3.0  # what one timed span should last at least, on CUDA
MAX_CALLS = 100  # calls in one span
ESTIMATE_CALLS = 3


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return statistics.median(values), cuts[0], cuts[3]


def synchronize(device: str) -> None:
    """Waits for the device; nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def span_ms(calls: Sequence[Call], device: str) -> float:
    """Milliseconds of all the calls, one after another."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin) * 1e3


def captured(calls: Sequence[Call], device: str, *, warmup: int = 3) -> Call:
    """One call that does all of `calls`: the replay of a CUDA graph; on a CPU, a loop.

    What the calls return is dropped. A call that synchronises or allocates by data cannot be
    captured and raises torch's error.
    """
    if device != "cuda":

        def loop() -> None:
            for call in calls:
                call()

        return loop
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def cold_sets(bytes_per_set: int, device: str, *, limit: int = 64) -> int:
    """How many sets of tensors exceed three times the L2 cache together; 1 on a CPU."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(limit, -(-3 * cache // max(bytes_per_set, 1)) + 1))


def interleave(
    variants: dict[str, Call | Sequence[Call]],
    device: str,
    *,
    repeats: int,
    warmup: int = 2,
    calls: int | None = None,
    per_call: dict[str, int] | None = None,
) -> dict[str, tuple[float, float, float]]:
    """Times all variants in turn, so that a change of load meets all alike.

    The order is drawn anew for each turn: a variant finds in the caches what the one before left.

    Args:
        variants: name -> call, or calls on one set of tensors each, taken in rotation.
        calls: calls in one timed span; by default 1 on the CPU, and on CUDA enough for 3 ms.
        per_call: name -> how many runs of the operation one call holds (a captured rotation).
    Returns:
        {name: (median, 20th, 80th percentile)} in ms of one run.
    """
    spans: dict[str, list[Call]] = {}
    for name, given in variants.items():
        rotation = [given] if callable(given) else list(given)
        for _ in range(warmup):
            for call in rotation:
                call()
        count = calls or 1
        if calls is None and device == "cuda":
            one = span_ms([rotation[i % len(rotation)] for i in range(ESTIMATE_CALLS)], device)
            count = int(SPAN_MS * ESTIMATE_CALLS / max(one, 1e-6))
            count = max(1, min(MAX_CALLS, count))
        spans[name] = [rotation[i % len(rotation)] for i in range(max(count, len(rotation)))]
    times: dict[str, list[float]] = {name: [] for name in variants}
    order, generator = list(spans), random.Random(0)
    for _ in range(repeats):
        generator.shuffle(order)
        for name in order:
            runs = len(spans[name]) * (per_call or {}).get(name, 1)
            times[name].append(span_ms(spans[name], device) / runs)
    return {name: quantiles(values) for name, values in times.items()}


def count_launches(call: Call) -> int | None:
    """Kernels and copies that one call puts on the GPU; None where the profiler sees none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type == DeviceType.CUDA for e in trace.events()) or None
