"""Whether a run goes on with the scales that it began with."""

from typing import Any

import jax
import numpy as np

from repopt_jax.core import paths
from repopt_jax.train.state import TrainState

# Equal scales may be computed by other versions of a library: relatively, this far apart is the same.
SAME_SCALES = 1e-6


def check_scales(fresh: TrainState, restored: TrainState, *, source: str) -> None:
    """Refuses to go on with other scales than those that a run began with.

    Args:
      fresh: the state as the config's scales give it; constant scales are in the optimizer's state.
      restored: the state of the checkpoint.
      source: what the config calls its scales.

    Raises:
      ValueError: naming the layers and branches whose scales differ.
    """
    here, there = (_scales_in(state.opt_state) for state in (fresh, restored))
    differing = [
        f"{name} (channel {channel}: {here[name][channel]:.6g} there, {there[name][channel]:.6g} in the "
        "checkpoint)"
        for name in sorted(here)
        if (channel := _most_different(here[name], there[name])) is not None
    ]
    if differing:
        raise ValueError(
            f"`scales` {source} are not those that this run began with; {len(differing)} of {len(here)} "
            f"vectors differ, here where they differ most: {paths.listed(differing, len(differing))}. Put "
            "back the scales that were there, or begin a new run in another folder"
        )


def _scales_in(tree: Any) -> dict[str, np.ndarray]:
    """ "Layer branch" -> vector, of the leaves below an entry `scales`."""
    found = {}
    for path, leaf in paths.named_leaves(tree)[0].items():
        before, mark, after = f"/{path}".partition("/scales/")
        if mark:
            # In an optimizer's state the layer's path comes behind the entry, in a network before it.
            *layer, branch = [*([] if "/" in after else before.split("/")), *after.split("/")]
            found[f"{'/'.join(filter(None, layer))} {branch}"] = np.ravel(jax.device_get(leaf))
    return found


def _most_different(first: np.ndarray, second: np.ndarray) -> int | None:
    distance = np.abs(first.astype(np.float64) - second)
    channel = int(distance.argmax())
    return channel if distance[channel] > SAME_SCALES * np.abs(first).max() else None
