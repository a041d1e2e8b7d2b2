"""What is measured: the network, its input, and how often."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

from repopt_jax import models
from repopt_jax.hints import did_you_mean

XLA = "xla"
# Name on the command line -> title in results, mode, and scales.
NETWORKS: dict[str, tuple[str, str, str]] = {
    "plain": ("plain", "plain", ""),
    "repopt": ("RepOpt", "repopt", "depth"),
    "search": ("search, merged in weight space", "search", ""),
    "orepa": ("OREPA, merged in weight space", "orepa", ""),
    "repvgg": ("RepVGG", "repvgg", ""),
    # What `nn.conv_general_dilated` is worth; the same program everywhere but on a CPU.
    XLA: ("plain, XLA's convolutions", "plain", ""),
}
DTYPES = ("float32", "bfloat16")
MIN_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      model: a classifier of `models.list()`.
      size: side of the square images, in pixels.
      batches: batch sizes; each is measured.
      dtypes: computation dtypes, "float32" or "bfloat16"; each is measured. Parameters are float32.
      rounds: number of measurements of each candidate, at least 3.
      classes: number of classes.
      networks: names of `NETWORKS`.
      memory: limit for the largest batch, in units of 1e9 bytes; None for the device's memory.
      tf32: whether float32 convolutions and products may run in TF32, in JAX and in PyTorch. NVIDIA GPUs have
        it; other devices compute in float32 either way.
      images: folder of images (`train/<class>/*`) for the input pipeline; "" for generated photographs.

    Raises:
      ValueError: values that cannot be measured, all of them.
    """

    model: str = "repopt-vgg-b1"
    size: int = 224
    batches: tuple[int, ...] = (32,)
    dtypes: tuple[str, ...] = ("float32",)
    rounds: int = 15
    classes: int = 1000
    networks: tuple[str, ...] = ("plain", "repopt", "search", "repvgg")
    memory: float | None = None
    tf32: bool = True
    images: str = ""

    def __post_init__(self) -> None:
        counts = {"size": (self.size,), "batch": self.batches, "classes": (self.classes,)}
        problems = [
            f"`{name}` {value} must be at least 1"
            for name, values in counts.items()
            for value in values
            if value < 1
        ]
        if self.rounds < MIN_ROUNDS:
            problems.append(f"`rounds` is {self.rounds}: medians with quartiles need at least {MIN_ROUNDS}")
        if self.memory is not None and not (math.isfinite(self.memory) and self.memory > 0):
            problems.append(f"`memory` is {self.memory}: it must be a number of gigabytes above 0")
        problems += _unknown("model", (self.model,), models.list("classify"))
        problems += _unknown("dtype", self.dtypes, DTYPES)
        problems += _unknown("networks", self.networks, NETWORKS)
        problems += [
            f"`{name}` is empty: give at least one"
            for name, values in (("batch", self.batches), ("dtype", self.dtypes), ("networks", self.networks))
            if not values
        ]
        if problems:
            raise ValueError("this cannot be measured: " + "; ".join(problems))

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """Each dtype with each batch size."""
        return list(itertools.product(self.dtypes, self.batches))

    def label(self, dtype: str, batch: int) -> str:
        """Describes one measurement: `repopt-vgg-b1, bfloat16, 32 images of 224 px`."""
        return f"{self.model}, {dtype}, {batch} images of {self.size} px"

    def recorded(self, **more: Any) -> dict[str, Any]:
        """Returns the settings, with `more`, that results record for one measurement."""
        return {"model": self.model, "classes": self.classes, **more}


def _unknown(name: str, values: Iterable[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    return [
        f"`{name}` {value!r} is none of {', '.join(known)}{did_you_mean(value, known)}"
        for value in values
        if value not in known
    ]
