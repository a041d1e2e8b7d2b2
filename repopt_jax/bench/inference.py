"""Inference with deployed networks, compared with the same networks before they are fused."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.bench.networks import new_model, random_batch, title, tracing
from repopt_jax.bench.results import Section
from repopt_jax.bench.settings import Settings
from repopt_jax.bench.step import add_speed, section_of
from repopt_jax.bench.timing import Builder, Candidate, Facts, measure, memory
from repopt_jax.surgery.fuse import fuse

LOG = logging.getLogger(__name__)

# The networks that are deployed; RepOpt trains the plain one.
DEPLOYED = ("repopt", "repvgg")


def bench_inference(settings: Settings) -> list[Section]:
    """Times the logits of a batch of images, by fused networks and by the original ones."""
    return [_inference(settings, *pair) for pair in settings.pairs]


def deployed(settings: Settings) -> list[str]:
    """Returns which of the networks are deployed.

    Raises:
      ValueError: none of them.
    """
    names = [name for name in DEPLOYED if name in settings.networks]
    if not names:
        raise ValueError(
            f"`networks` {', '.join(settings.networks)} must hold one of {', '.join(DEPLOYED)} for the part "
            "inference: add one, or name the other parts"
        )
    return names


def _inference(settings: Settings, dtype: str, batch: int) -> Section:
    LOG.info("inference: %s", settings.label(dtype, batch))
    images = random_batch(settings, batch)["image"]
    builders: dict[str, Builder] = {}
    for name in deployed(settings):
        model = new_model(name, settings, dtype)
        model.eval()
        for form, make in (("fused", fuse), ("not fused", lambda model: model)):
            builders[f"{title(name)}, {form}"] = lambda name=name, model=model, make=make: inferring(
                name, make(model), images, dtype, settings.tf32
            )
    first = next(iter(builders))
    found = measure(builders, settings.rounds, dict.fromkeys(builders, (first,)))
    add_speed(found, batch)
    return section_of("inference", "Inference", settings, dtype, batch, found)


def inferring(name: str, model: Any, images: jax.Array, dtype: str, tf32: bool) -> tuple[Candidate, Facts]:
    """Runs a network in evaluation mode on one batch, with weights in `dtype` as deployed."""
    graphdef, state = nnx.split(model)

    def as_deployed(leaf: Any) -> Any:
        # Vectors (batch statistics, biases) keep their dtype, because they are small.
        return leaf.astype(dtype) if leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    state = jax.tree.map(as_deployed, state)
    run: Callable[..., Any] = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    with tracing(name, tf32):
        compiled = run.lower(state, images).compile()
    facts = {"weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)), **memory(compiled)}
    return Candidate(lambda: compiled(state, images)), facts
