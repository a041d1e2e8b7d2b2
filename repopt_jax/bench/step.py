"""A whole training step: forward, backward, update, batch norm in training mode; and the largest batch."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from repopt_jax.bench.networks import abstract_training, title, tracing, training
from repopt_jax.bench.results import Section
from repopt_jax.bench.settings import XLA, Settings
from repopt_jax.bench.timing import (
    DOES_NOT_FIT,
    Builder,
    Candidate,
    Facts,
    carrying,
    measure,
    memory,
    out_of_memory,
)

LOG = logging.getLogger(__name__)

PLAIN, REPVGG, WITH_XLA = title("plain"), title("repvgg"), title(XLA)
# The search for the largest batch ends within 1/RESOLUTION of it, after compiling at most this many programs.
RESOLUTION = 32
MAX_COMPILED = 12
# Memory of a program that the compiler refuses, in bytes: more than any device has.
UNKNOWN = 2**60


def bench_step(settings: Settings) -> list[Section]:
    """Measures training steps of the networks, at equal batch size and dtype."""
    return [_step(settings, *pair) for pair in settings.pairs]


def _step(settings: Settings, dtype: str, batch: int) -> Section:
    LOG.info("step: %s", settings.label(dtype, batch))
    builders: dict[str, Builder] = {
        title(name): (lambda name=name: stepping(name, settings, dtype, batch)) for name in settings.networks
    }
    found = measure(builders, settings.rounds, dict.fromkeys(builders, (PLAIN, REPVGG, WITH_XLA)))
    add_speed(found, batch)
    return section_of("step", "Training step", settings, dtype, batch, found)


def stepping(name: str, settings: Settings, dtype: str, batch: int) -> tuple[Candidate, Facts]:
    """Runs training steps of one network, each from the state after the previous one."""
    step, state, images = training(name, settings, dtype, batch)
    with tracing(name, settings.tf32):
        compiled = step.lower(state, images).compile()
    return Candidate(carrying(compiled, [state], images)), memory(compiled)


def add_speed(found: dict[str, Facts], batch: int) -> None:
    """Adds images/s to the results of this batch size."""
    for facts in found.values():
        if "ms" in facts:
            facts["images_per_s"] = 1e3 * batch / facts["ms"]["median"]


def section_of(
    part: str,
    heading: str,
    settings: Settings,
    dtype: str,
    batch: int,
    found: dict[str, Facts],
    *,
    rounds: int | None = None,
    notes: Sequence[str] = (),
    **more: Any,
) -> Section:
    """Makes a section of results with one dtype and one batch size; `more` is recorded in its settings."""
    return Section(
        part=part,
        title=f"{heading}, {settings.label(dtype, batch)}",
        settings=settings.recorded(size=settings.size, dtype=dtype, batch=batch, tf32=settings.tf32, **more),
        rounds=settings.rounds if rounds is None else rounds,
        candidates=found,
        notes=list(notes),
    )


def bench_largest(settings: Settings) -> list[Section]:
    """Finds the largest batch whose training step fits in memory."""
    limit, where = memory_limit(settings)
    return [_largest(settings, dtype, limit, where) for dtype in settings.dtypes]


def _largest(settings: Settings, dtype: str, limit: int, where: str) -> Section:
    found: dict[str, Facts] = {}
    for name in settings.networks:
        LOG.info("largest batch: %s, %s", title(name), dtype)
        programs = Programs(name, settings, dtype)
        largest = largest_batch(programs.peak, limit, settings.batches[0])
        if jax.default_backend() != "cpu":  # a CPU could swap, so there the compiler's count decides
            largest = confirmed(programs.runs, largest)
        peaks = {str(batch): programs.peaks[batch] for batch in sorted(programs.peaks)}
        found[title(name)] = {"batch": largest, "peaks": peaks} if largest else {"failed": DOES_NOT_FIT}
    base = found.get(REPVGG, {}).get("batch")
    for facts in found.values():
        if base and "batch" in facts:
            facts["of_repvgg"] = facts["batch"] / base
    return Section(
        part="largest",
        title=f"Largest batch, {settings.model}, {dtype}, {settings.size} px, in {limit / 1e9:.1f} GB",
        settings=settings.recorded(size=settings.size, dtype=dtype, limit_bytes=limit, limit_is=where),
        candidates=found,
    )


class Programs:
    """Training steps of one network, compiled for batches of any size without making arrays."""

    def __init__(self, name: str, settings: Settings, dtype: str):
        self.name: str = name
        self.settings: Settings = settings
        self.dtype: str = dtype
        self.peaks: dict[int, int] = {}
        self.compiled: dict[int, Any] = {}

    def peak(self, batch: int) -> int:
        """Returns the bytes that the step needs."""
        step, state, images = abstract_training(self.name, self.settings, self.dtype, batch)
        try:
            with tracing(self.name, self.settings.tf32):
                self.compiled[batch] = step.lower(state, images).compile()
            self.peaks[batch] = memory(self.compiled[batch])["peak_bytes"]
        except Exception as error:  # some compilers refuse what cannot fit
            if not out_of_memory(error):
                raise
            self.peaks[batch] = UNKNOWN
        LOG.info("  %d images: %.2f GB", batch, self.peaks[batch] / 1e9)
        return self.peaks[batch]

    def runs(self, batch: int) -> bool:
        """Whether one step fits on the device."""
        try:
            if batch not in self.compiled:
                self.peak(batch)
            _, state, images = training(self.name, self.settings, self.dtype, batch)
            jax.block_until_ready(self.compiled[batch](state, images))
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        return True


def largest_batch(peak: Callable[[int], int], limit: int, start: int) -> int:
    """Finds the largest batch b with peak(b) <= limit, to within 1/32 of it; 0 if there is none.

    Peak memory is nearly linear in b, so secant steps find b in three or four measurements; bisection is the
    fallback.
    """
    fits, too_large, known = 0, None, {}
    guess = start
    for _ in range(MAX_COMPILED):
        known[guess] = peak(guess)
        if known[guess] <= limit:
            fits = max(fits, guess)
        else:
            too_large = min(guess, too_large or guess)
        if too_large is not None and too_large - fits <= max(1, fits // RESOLUTION):
            break
        guess = _next_guess(known, limit, fits, too_large)
    return fits


def _next_guess(known: dict[int, int], limit: int, fits: int, too_large: int | None) -> int:
    """Returns a batch size strictly between the largest that fits and the smallest that does not."""
    top = too_large if too_large is not None else 8 * fits + 1
    guess = (fits + top) // 2 if too_large is not None else 2 * fits
    if len(known) > 1:
        # The two whose peaks are nearest to the limit.
        a, b = sorted(known, key=lambda batch: abs(known[batch] - limit))[:2]
        slope = (known[a] - known[b]) / (a - b)
        if slope > 0:
            guess = int(a + (limit - known[a]) / slope)
        if guess <= fits:  # nearly found: check that the next size does not fit
            guess = fits + max(1, fits // RESOLUTION)
    return min(max(guess, fits + 1), top - 1)


def confirmed(runs: Callable[[int], bool], batch: int) -> int:
    """Finds the largest batch from `batch` down, in steps of 1/32 of it, that runs."""
    while batch > 0 and not runs(batch):
        LOG.info("  %d images fit by the compiler's count, but not on the device", batch)
        batch -= max(1, batch // RESOLUTION)
    return batch


def memory_limit(settings: Settings) -> tuple[int, str]:
    """Returns the limit in bytes, and its source as text.

    Raises:
      ValueError: neither `settings`, the device nor the machine has one.
    """
    if settings.memory is not None:
        return int(1e9 * settings.memory), "as given"
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    if jax.default_backend() != "cpu" and "bytes_limit" in stats:
        return int(stats["bytes_limit"]), "what JAX may use of the device's memory"
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0]), "memory of the machine that is free"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory of the machine"
    raise ValueError("the device does not report its memory: give --memory=GB")
