"""Times candidates in turn, and compares them within a round.

In every round the candidates run in another order, and a ratio is that of two times of one round: the median
of these ratios depends little on other work of the machine. A measurement waits for the device once, at its
end; until then calls are queued as in a training loop, so that the time of a short program is not that of its
dispatch.
"""

import dataclasses
import logging
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

LOG = logging.getLogger(__name__)

# The least duration of a measurement, and the most calls that are queued for it.
MIN_SECONDS = 0.05
MAX_CALLS = 50

DOES_NOT_FIT = "does not fit in the memory"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to be timed.

    Attributes:
      start: runs it once, or queues it, and returns the argument of `wait`.
      wait: returns when everything that was started is done.
      repeats: number of timed repetitions in one call.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    repeats: int = 1


# Results of a candidate: name -> number, text, or None.
Facts = dict[str, Any]
Builder = Callable[[], tuple[Candidate, Facts]]


def measure(
    builders: Mapping[str, Builder], rounds: int, baselines: Mapping[str, Sequence[str]]
) -> dict[str, Facts]:
    """Builds and times candidates, and compares them.

    Args:
      builders: name -> function that makes the candidate and its facts.
      rounds: number of measurements of each.
      baselines: name -> the candidates that it is compared with.

    Returns:
      For each name its facts, "ms" (median, quartiles "low" and "high", and "best"; of one repetition) and
      "ratios" (baseline -> median, low, high of the ratio of the times in the same round). For a candidate
      that does not fit in memory, {"failed": reason}.
    """
    candidates, facts = {}, {}
    for name, build in builders.items():
        LOG.info("  preparing %s", name)
        try:
            candidates[name], facts[name] = build()
        except Exception as error:
            facts[name] = {"failed": _failure_reason(error)}
    times, failed = interleave(candidates, rounds)
    for name in builders:
        if name in failed:
            facts[name] = {"failed": failed[name]}
        elif name in times:
            ratios = {
                base: spread([t / b for t, b in zip(times[name], times[base])])
                for base in baselines.get(name, ())
                if base in times
            }
            facts[name] |= {"ms": spread([1e3 * t for t in times[name]]), "ratios": ratios}
    return {name: facts[name] for name in builders}


def interleave(
    candidates: Mapping[str, Candidate], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Returns the seconds of one repetition of every candidate in every round, and reasons of failures."""
    left = dict(candidates)
    failed: dict[str, str] = {}

    def seconds(name: str, calls: int) -> float | None:
        try:
            return _seconds(left[name], calls)
        except Exception as error:
            failed[name] = _failure_reason(error)
            del left[name]
            return None

    # The first call includes what happens only once; the second determines the calls of a measurement.
    calls = {}
    for name in candidates:
        if seconds(name, 1) is not None and (once := seconds(name, 1)) is not None:
            one_call = once * candidates[name].repeats
            calls[name] = min(max(1, math.ceil(MIN_SECONDS / one_call)), MAX_CALLS)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        LOG.info("  round %d of %d", i + 1, rounds)
        order = list(left)
        random.Random(i).shuffle(order)
        for name in order:
            if (taken := seconds(name, calls[name])) is not None:
                times[name].append(taken)
    return {name: values for name, values in times.items() if name in left}, failed


def _seconds(candidate: Candidate, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls - 1):
        candidate.start()
    candidate.wait(candidate.start())
    return (time.perf_counter() - begin) / (calls * candidate.repeats)


def _failure_reason(error: Exception) -> str:
    """Returns why a candidate cannot be measured; reraises errors other than lack of memory."""
    if not out_of_memory(error):
        raise error
    LOG.info("  %s", DOES_NOT_FIT)
    return DOES_NOT_FIT


def out_of_memory(error: BaseException) -> bool:
    """Whether this is an out-of-memory error of JAX or PyTorch, on any device."""
    text = f"{type(error).__name__} {error}"
    named = re.search(r"RESOURCE_EXHAUSTED|OutOfMemoryError|out of memory|can't allocate memory", text, re.I)
    return isinstance(error, MemoryError) or named is not None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, quartiles and minimum of at least two numbers."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high, "best": min(values)}


def carrying(compiled: Any, carried: Sequence[Any], *arguments: Any) -> Callable[[], Any]:
    """Returns a function that calls `compiled(*carried, *arguments)` and carries its first results over.

    It is for programs that donate their state.
    """
    state = list(carried)

    def start() -> Any:
        out = compiled(*state, *arguments)
        state[:] = out[: len(state)]
        return out

    return start


def memory(compiled: Any) -> Facts:
    """Returns the bytes that the compiler reserves: arguments, results and temporaries, donated ones once."""
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return {"temporary_bytes": m.temp_size_in_bytes, "peak_bytes": total}
