"""Measures how long compiling a training step takes, without caches."""

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import time

import jax
from jax.experimental.compilation_cache import compilation_cache

from repopt_jax.bench.networks import abstract_training, title, tracing
from repopt_jax.bench.results import Section
from repopt_jax.bench.settings import Settings
from repopt_jax.bench.step import section_of
from repopt_jax.bench.timing import Facts, spread

LOG = logging.getLogger(__name__)

# Compilations of each network, and the seconds after which no further round of them is begun.
COMPILATIONS = 3
MAX_SECONDS = 120


def bench_compile(settings: Settings) -> list[Section]:
    """Measures the seconds to trace and lower, and to compile, a training step."""
    return [_compile(settings, *pair) for pair in settings.pairs]


def _compile(settings: Settings, dtype: str, batch: int) -> Section:
    LOG.info("compile: %s", settings.label(dtype, batch))
    # A GPU's compiler keeps what it has autotuned until its process ends.
    measured = in_a_new_process if jax.default_backend() == "gpu" else seconds
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in settings.networks}
    begin = time.perf_counter()
    for _ in range(COMPILATIONS):
        for name in settings.networks:
            taken[name].append(measured(name, settings, dtype, batch))
            LOG.info("  %s: %.1f s and %.1f s", title(name), *taken[name][-1])
        if time.perf_counter() - begin > MAX_SECONDS:
            break
    rounds = len(taken[settings.networks[0]])
    found: dict[str, Facts] = {}
    for name, pairs in taken.items():
        lower, compile_ = (list(values) for values in zip(*pairs))
        sums = [a + b for a, b in pairs]
        found[title(name)] = {
            key: spread(values) if rounds > 1 else {"median": values[0]}
            for key, values in (("lower_s", lower), ("compile_s", compile_), ("total_s", sums))
        }
    heading = "Compile time of a training step"
    return section_of("compile", heading, settings, dtype, batch, found, rounds=rounds)


def seconds(name: str, settings: Settings, dtype: str, batch: int) -> tuple[float, float]:
    """Returns the seconds of tracing and lowering, and of compiling; no array is made."""
    step, state, images = abstract_training(name, settings, dtype, batch)
    with without_caches(), tracing(name, settings.tf32):
        begin = time.perf_counter()
        lowered = step.lower(state, images)
        middle = time.perf_counter()
        lowered.compile()
        return middle - begin, time.perf_counter() - middle


def in_a_new_process(name: str, settings: Settings, dtype: str, batch: int) -> tuple[float, float]:
    """Returns `seconds`, measured in a new process that leaves the device's memory to this one."""
    before = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(seconds, name, settings, dtype, batch).result()
    finally:
        if before is None:
            del os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]
        else:
            os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = before


@contextlib.contextmanager
def without_caches():
    """Disables JAX's caches of compiled programs, in memory and on disk."""
    jax.clear_caches()
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks up only once whether there is a cache on disk
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
