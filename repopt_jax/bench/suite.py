"""`repopt bench`: runs the parts by name one after the other, and writes the results after each."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repopt_jax import models
from repopt_jax.arguments import check_items
from repopt_jax.bench import results
from repopt_jax.bench.compiling import bench_compile
from repopt_jax.bench.conv import bench_conv
from repopt_jax.bench.feeding import bench_input, check_images
from repopt_jax.bench.inference import bench_inference, deployed
from repopt_jax.bench.results import Section
from repopt_jax.bench.settings import Settings
from repopt_jax.bench.step import bench_largest, bench_step
from repopt_jax.bench.update import bench_optimizers, bench_update, check_multipliers

LOG = logging.getLogger(__name__)


def _bench_torch(settings: Settings) -> list[Section]:
    from repopt_jax.bench.torch_step import bench_torch

    return bench_torch(settings)


def _check_torch(settings: Settings) -> None:
    network = models.find(settings.model)
    if network.family is not models.vgg or network.variant.pre_se:
        raise ValueError(
            f"the part torch makes VGG-style networks without squeeze-and-excitation only, not "
            f"{settings.model}: name the other parts, or measure another network"
        )


# In the order in which "all" runs them.
PARTS: dict[str, Callable[[Settings], list[Section]]] = {
    "update": bench_update,
    "optimizers": bench_optimizers,
    "step": bench_step,
    "largest": bench_largest,
    "inference": bench_inference,
    "torch": _bench_torch,
    "conv": bench_conv,
    "compile": bench_compile,
    "input": bench_input,
}
# What raises ValueError where a part cannot measure the settings: all are asked before the first part is run.
CHECKS: dict[str, Callable[[Settings], Any]] = {
    "update": check_multipliers,
    "optimizers": check_multipliers,
    "inference": deployed,
    "torch": _check_torch,
    "input": check_images,
}


def bench(
    parts: Sequence[str],
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    *,
    out: str | Path | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Runs the parts and returns their results: {"machine": ..., "sections": [...]}.

    Args:
      parts: names of `PARTS`, or "all".
      settings: what is measured.
      out: path without suffix. After each part OUT.json, OUT.md and OUT.png are written, including what is in
        OUT.json already; new results replace earlier ones of the same part and title.
      command: the command that is recorded in the results.

    Raises:
      ValueError: unknown parts; settings that some of them cannot measure, of which all are listed before
        anything is measured; OUT.json holds something else, or results of another machine; or as the parts.
      ModuleNotFoundError: torch is the only part and not installed.
    """
    check_items("parts", parts, "names of parts")
    parts = list(PARTS) if "all" in parts else list(dict.fromkeys(parts))
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"`parts` {', '.join(unknown)}: they must be of {', '.join(PARTS)} or all")
    if not parts:
        raise ValueError(f"`parts` is empty: give some of {', '.join(PARTS)}, or all")
    problems = []
    for check in dict.fromkeys(CHECKS[part] for part in parts if part in CHECKS):
        try:
            check(settings)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    everything = results.read(out) if out else None
    done: list[Section] = []
    for part in parts:
        busy = results.load()
        try:
            sections = PARTS[part](settings)
        except ModuleNotFoundError as error:
            if part != "torch" or error.name != "torch" or len(parts) == 1:
                raise
            LOG.warning("torch: not installed, not measured")
            continue
        for section in sections:
            section.command, section.load = command, busy
        done += sections
        if out:
            everything = results.joined(everything, sections)
            results.write(out, everything)
    return results.joined(None, done)
