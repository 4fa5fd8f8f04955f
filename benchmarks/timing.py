"""Measuring in turn: time and peak memory, as ratios to one baseline."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

#: Gives what is timed. What entering and leaving it does (hooks, gradients that are left) is not timed.
Contestant = Callable[[], AbstractContextManager[Callable[[], object]]]

# So many others to one turn of the baseline.
_OTHERS = 7
# Seconds in which threads that the one before has left spinning, as OpenBLAS does, fall asleep.
_PAUSE = 0.15


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of one value or more."""
        if len(values) == 1:
            return cls(*values * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Seconds:
    """How long one call took, by the processor's time and by the clock on the wall or the device's own."""

    cpu: float
    wall: float


#: Times a number of calls, and gives what one of them took.
Clock = Callable[[Callable[[], object], int], Seconds]


@dataclass(frozen=True)
class Ratios:
    """What a contestant took, by what the baseline of the same round took."""

    cpu: Spread
    wall: Spread


@dataclass(frozen=True)
class Race:
    """What came of the rounds.

    Attributes:
        baseline: one call of the baseline, the median of the rounds.
        ratios: each contestant's.
        raised: why a contestant has no ratios.
    """

    baseline: Seconds
    ratios: dict[str, Ratios]
    raised: dict[str, str]


def plain(call: Callable[[], object]) -> Contestant:
    """A contestant that needs no preparation."""
    return lambda: nullcontext(call)


def on_host(call: Callable[[], object], calls: int) -> Seconds:
    """By the host's clocks, after a pause."""
    time.sleep(_PAUSE)
    if calls > 1:
        call()  # of short calls, waking up would be a part
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    return Seconds((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)


def on_cuda(call: Callable[[], object], calls: int) -> Seconds:
    """By CUDA events before the first call and after the last, one after another without a pause."""
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


# A turn is as many calls as the baseline makes in this time, in seconds.
_TURN = {on_host: 0.2, on_cuda: 0.03}


def interleaved(
    baseline: Contestant,
    contestants: Mapping[str, Contestant],
    rounds: int,
    clock: Clock = on_host,
) -> Race:
    """Runs all in turn, in every round in another order.

    The baseline has several turns in a round, the median of which is the round's. Garbage is collected before
    each turn.

    Args:
        baseline: what the others are divided by.
        contestants: the others. One that raises when it warms up is left out of the rounds.
        rounds: how many rounds.
        clock: what they are timed by.
    """

    def turn(contestant: Contestant, calls: int) -> Seconds:
        with contestant() as call:
            gc.collect()
            return clock(call, calls)

    def warm_up(contestant: Contestant) -> str:
        """Why it raises; empty if it does not."""
        try:
            turn(contestant, 1)
        except Exception as error:  # a peer's, whatever it is
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return ""

    raised = {name: reason for name, one in contestants.items() if (reason := warm_up(one))}
    running = {name: one for name, one in contestants.items() if name not in raised}
    turn(baseline, 1)
    calls = max(1, math.ceil(_TURN[clock] / turn(baseline, 1).wall))
    turns = [None] * (1 + len(running) // _OTHERS) + list(running)
    taken: list[Seconds] = []
    cpu: dict[str, list[float]] = {name: [] for name in running}
    wall: dict[str, list[float]] = {name: [] for name in running}
    gc.collect()
    gc.freeze()  # what has been imported need not be looked through before each turn
    for _ in range(rounds):
        random.shuffle(turns)
        own: list[Seconds] = []
        others: dict[str, Seconds] = {}
        for name in turns:
            if name is None:
                own.append(turn(baseline, calls))
            else:
                others[name] = turn(running[name], calls)
        taken.append(_median(own))
        for name, seconds in others.items():
            cpu[name].append(seconds.cpu / taken[-1].cpu)
            wall[name].append(seconds.wall / taken[-1].wall)
    gc.unfreeze()
    ratios = {name: Ratios(Spread.of(cpu[name]), Spread.of(wall[name])) for name in running}
    return Race(_median(taken), ratios, raised)


def peak_memory(contestant: Contestant, clock: Clock = on_host) -> int:
    """The most bytes of new tensors that were alive at once in a call, after another one to warm up.

    They are what torch's allocator was asked for; what libraries allocate elsewhere (NumPy) is not in it, nor
    are the parameters and the input, which were there before. On a GPU the workspaces of its libraries are.
    """
    with contestant() as call:
        call()
    with (
        contestant() as call
    ):  # with nothing left of the first, whose end would count as memory that is freed
        gc.collect()
        return _peak_on_cuda(call) if clock is on_cuda else _peak_on_host(call)


def _peak_on_cuda(call: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_host(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes):
        alive += change
        peak = max(peak, alive)
    return peak


def _median(seconds: list[Seconds]) -> Seconds:
    cpu, wall = (statistics.median(each) for each in zip(*((s.cpu, s.wall) for s in seconds), strict=True))
    return Seconds(cpu, wall)
