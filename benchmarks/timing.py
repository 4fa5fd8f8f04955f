"""Measures CPU time, wall time and peak memory of calls, which take turns with a baseline."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

#: Returns a context manager that yields the call to measure. Only the call is timed; entering and leaving the
#: context (attaching and removing hooks, clearing gradients) is not.
Contestant = Callable[[], AbstractContextManager[Callable[[], object]]]
#: The measurements of one contestant, as ``results.json`` stores them.
Cell = dict[str, Any]

# In each round the baseline has one turn, and one more for every seven contestants.
_CONTESTANTS_PER_BASELINE = 7
# Pause before a turn, in seconds. It lets threads that still spin after the previous turn (OpenBLAS) go idle.
_PAUSE = 0.15


@dataclass(frozen=True)
class Seconds:
    """Duration of one call: CPU time of the process, and time by the wall clock or by CUDA events."""

    cpu: float
    wall: float


#: Makes a call a given number of times and returns its mean duration.
Clock = Callable[[Callable[[], object], int], Seconds]


def as_contestant(call: Callable[[], object]) -> Contestant:
    """Makes a contestant of a call that needs no preparation."""
    return lambda: nullcontext(call)


def time_on_host(call: Callable[[], object], calls: int) -> Seconds:
    """Times calls with the clocks of the host, after a pause."""
    time.sleep(_PAUSE)
    if calls > 1:
        call()  # This call wakes the threads up, which would take a visible part of a short call.
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    return Seconds((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)


def time_on_cuda(call: Callable[[], object], calls: int) -> Seconds:
    """Times calls that follow each other without a pause, with CUDA events around all of them."""
    call()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cpu = time.process_time()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return Seconds((time.process_time() - cpu) / calls, begin.elapsed_time(end) / 1000 / calls)


# Each turn makes as many calls as the baseline makes in this time, in seconds.
_TURN = {time_on_host: 0.2, time_on_cuda: 0.03}


def summarise(values: list[float]) -> list[float]:
    """Returns ``[median, lower quartile, upper quartile]``, or the only value."""
    if len(values) == 1:
        return values
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return [median, low, high]


def median_seconds(durations: list[Seconds]) -> Seconds:
    """Returns the medians of the CPU times and of the wall times."""
    return Seconds(
        statistics.median(taken.cpu for taken in durations),
        statistics.median(taken.wall for taken in durations),
    )


def measure_in_turn(
    baseline: Contestant,
    contestants: Mapping[str, Contestant],
    rounds: int,
    clock: Clock = time_on_host,
) -> tuple[Seconds, dict[str, Cell]]:
    """Times all contestants in every round, each round in a new random order.

    If the baseline has several turns in a round, their median counts. Garbage is collected before each turn.

    Args:
        baseline: the contestant that the others are compared with.
        contestants: the others, by name. One that raises an error in its warm-up call has no turns.
        rounds: number of rounds.
        clock: function that times a turn.

    Returns:
        The median time of one call of the baseline, and a cell for each contestant. A cell has ``cpu`` and
        ``wall``, relative to the baseline of the same round, or ``raised``, the error.
    """

    def take_turn(contestant: Contestant, calls: int) -> Seconds:
        with contestant() as call:
            gc.collect()
            return clock(call, calls)

    cells: dict[str, Cell] = {}
    ratios: dict[str, list[Seconds]] = {}
    for name, contestant in contestants.items():
        try:
            take_turn(contestant, 1)
        except Exception as error:  # Another library may raise any kind of error.
            cells[name] = {"raised": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        else:
            ratios[name] = []
    take_turn(baseline, 1)
    calls = max(1, math.ceil(_TURN[clock] / take_turn(baseline, 1).wall))
    turns = [None] * (1 + len(ratios) // _CONTESTANTS_PER_BASELINE) + list(ratios)
    durations: list[Seconds] = []
    gc.collect()
    gc.freeze()  # The collection before each turn then skips all objects that exist now.
    for _ in range(rounds):
        random.shuffle(turns)
        own: list[Seconds] = []
        others: dict[str, Seconds] = {}
        for name in turns:
            if name is None:
                own.append(take_turn(baseline, calls))
            else:
                others[name] = take_turn(contestants[name], calls)
        durations.append(median_seconds(own))
        for name, taken in others.items():
            ratios[name].append(Seconds(taken.cpu / durations[-1].cpu, taken.wall / durations[-1].wall))
    gc.unfreeze()
    for name, found in ratios.items():
        cells[name] = {
            "cpu": summarise([ratio.cpu for ratio in found]),
            "wall": summarise([ratio.wall for ratio in found]),
        }
    return median_seconds(durations), cells


def peak_memory(contestant: Contestant, clock: Clock = time_on_host) -> int:
    """Returns the highest number of bytes that new tensors held at the same time during a call.

    The number counts the bytes requested from torch's allocator; on a GPU these include the workspaces of its
    libraries. It leaves out parameters and input, which exist before the call, and memory that other
    libraries such as NumPy allocate themselves. A warm-up call comes first.
    """
    with contestant() as call:
        call()
    # The warm-up call has a context of its own, so that the tensors it left are freed before the measurement.
    # Freed during the measurement, they would count as negative memory.
    with contestant() as call:
        gc.collect()
        return _peak_on_cuda(call) if clock is time_on_cuda else _peak_on_host(call)


def _peak_on_cuda(call: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_host(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    # Each memory event has the size of one allocation; the size is negative when the memory is freed.
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes):
        alive += change
        peak = max(peak, alive)
    return peak
