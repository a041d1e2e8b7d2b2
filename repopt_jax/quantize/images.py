"""Whether calibration images are what the network was trained on: a wrong mean and std are a common mistake.

A batch norm keeps the means and variances of its inputs in training. Those of the calibration images at the
first batch norm must be about the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.quantize.calibration import batches_of
from repopt_jax.surgery.modules import check_model, intercepted, named_modules

# Measured on networks of digits: of the right images (8 or more) at most 0.075 and 1.11; without mean and
# std 0.19 and 6.5, and with those of other data 0.21 and 1.7.
LARGEST_SHIFT = 0.15
LARGEST_FACTOR = 1.4


@dataclasses.dataclass(frozen=True)
class ImageStatistics:
    """What the images are at the first batch norm, beside its running statistics.

    Attributes:
      norm: the path of the batch norm.
      shift: distance of the means from the running means, in running standard deviations, root mean square
        over the channels.
      factor: ratio of the variances to the running variances or its inverse, whichever is above 1; geometric
        mean over the channels.
    """

    norm: str
    shift: float
    factor: float

    @property
    def problem(self) -> str:
        """What is wrong in a sentence, or "" where nothing is."""
        if self.shift <= LARGEST_SHIFT and self.factor <= LARGEST_FACTOR:
            return ""
        return (
            f"the images are not what the network was trained on: at its first batch norm, {self.norm}, "
            f"their means differ from the running means by {self.shift:.2f} standard deviations (at most "
            f"{LARGEST_SHIFT} is usual) and their variances by a factor of {self.factor:.2f} (at most "
            f"{LARGEST_FACTOR}): check mean and std of the preprocessing"
        )


def image_statistics(model: nnx.Module, images: Any, *, batch_size: int = 64) -> ImageStatistics | None:
    """Returns what the images are at the first batch norm; None for a network without one, as a fused one.

    Args:
      model: the network before it was fused, in evaluation mode.
      images: as in `calibrate`.
      batch_size: how many images of an array are run at a time.

    Raises:
      ValueError, TypeError: images that `calibrate` refuses.
    """
    check_model(model)
    norms: dict[str, Any] = {path: m for path, m in named_modules(model) if _is_ordinary(m)}
    graphdef, state = nnx.split(model)
    called: list[str] = []

    @jax.jit
    def first(state: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        path, x = _first_norm_input(nnx.merge(graphdef, state, copy=True), batch)
        called.append(path)
        x = x.reshape(-1, x.shape[-1]).astype(jnp.promote_types(x.dtype, jnp.float32))
        return x.sum(0), (x * x).sum(0), x.shape[0]

    if not norms:
        return None
    totals: list[Any] = [0.0, 0.0, 0]
    for batch in batches_of(model, images, batch_size=batch_size):
        parts = jax.device_get(first(state, batch))
        totals = [total + np.asarray(part, np.float64) for total, part in zip(totals, parts)]
    norm, (total, squares, count) = norms[called[-1]], totals
    mean, variance = total / count, squares / count - np.square(total / count)
    kept = np.asarray(norm.var[...], np.float64) + norm.epsilon
    shift = (mean - np.asarray(norm.mean[...], np.float64)) / np.sqrt(kept)
    ratio = np.abs(np.log((np.maximum(variance, 0) + norm.epsilon) / kept))
    return ImageStatistics(called[-1], float(np.sqrt(np.square(shift).mean())), float(np.exp(ratio.mean())))


def check_images(model: nnx.Module, images: Any, *, batch_size: int = 64) -> None:
    """Raises ValueError if the images are not what the network was trained on; as `image_statistics`."""
    found = image_statistics(model, images, batch_size=batch_size)
    if found is not None and found.problem:
        raise ValueError(found.problem)


def _is_ordinary(module: nnx.Module) -> bool:
    """Whether it is a batch norm with a channel of its own for each channel of its input."""
    return type(module).__call__ is nnx.BatchNorm.__call__


class _Found(Exception):
    """Ends a trace at the first batch norm."""


def _first_norm_input(model: nnx.Module, batch: jax.Array) -> tuple[str, jax.Array]:
    """The path of the batch norm that is called first, and its input."""
    model = intercepted(model, _stop, lambda path, module: _is_ordinary(module))
    try:
        model(batch)  # pyright: ignore[reportCallIssue]
    except _Found as found:
        return found.args[0], found.args[1]
    raise ValueError("no batch norm of the network is called")


def _stop(path: str, call: Any, x: jax.Array, *args: Any, **options: Any) -> None:
    """Ends the trace at the call of a batch norm."""
    raise _Found(path, x)
