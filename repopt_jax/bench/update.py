"""The cost of the rule in the optimizer: one update of all parameters, compared with a copy.

SGD with momentum reads gradient, parameter and momentum and writes the last two: 20 bytes for each float32
parameter. A dense multiplier is one more array to read: 24 bytes. Updates are limited by memory bandwidth, so
their share of a copy's bandwidth shows how much faster they could be.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from repopt_jax.bench.networks import abstract_model
from repopt_jax.bench.results import Section
from repopt_jax.bench.settings import Settings
from repopt_jax.bench.timing import Builder, Candidate, Facts, carrying, measure, memory
from repopt_jax.core.scales import Scales
from repopt_jax.optim.adaptive import repopt_adamw, repopt_lion
from repopt_jax.optim.reparameterize import reparameterize
from repopt_jax.optim.sgd import gradient_multipliers, repopt_mask, repopt_sgd
from repopt_jax.surgery.search import depth_scales
from repopt_jax.train.config import OptimConfig
from repopt_jax.train.optimizer import make_optimizer

LOG = logging.getLogger(__name__)

BYTES = 20
BYTES_WITH_MULTIPLIER = 24
# Updates in one program, because a GPU computes one faster than the host passes 400 arrays.
UPDATES = 4
# As in a training step, every update in a loop must build the multiplier; the compiler must not hoist it.
IN_A_LOOP: dict[str, str | bool] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
DECAY = 4e-5
COPY = "copy"


def bench_update(settings: Settings) -> list[Section]:
    """Measures the trainer's Nesterov SGD with decay: plain, with `repopt_mask`, with a stored multiplier."""
    shapes, scales = parameters(settings)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    plain, repopt = (
        make_optimizer(OptimConfig(), optax.constant_schedule(0.1), scales=s, batch_size=1, decayed=kernels)
        for s in (None, scales)
    )
    chains = {
        "plain SGD": (plain, BYTES),
        "repopt_mask": (repopt, BYTES),
        "stored multiplier": (optax.chain(stored_multiplier(scales), plain), BYTES_WITH_MULTIPLIER),
    }
    values = random_like(shapes)
    builders: dict[str, Builder] = {
        name: (lambda tx=tx, moved=moved: updating(tx, values, {"moved_bytes": moved * count}))
        for name, (tx, moved) in chains.items()
    }
    builders[COPY] = lambda: copying(BYTES * count)
    LOG.info("update: %s parameters", f"{count:,}")
    found = measure(
        builders, settings.rounds, dict.fromkeys(chains, ("plain SGD", COPY)) | {COPY: ("plain SGD",)}
    )
    add_bandwidth(found)
    add_extra_state(found, dict.fromkeys(chains, "plain SGD"))
    return [
        Section(
            part="update",
            title=f"Optimizer update, SGD, {settings.model}, {count:,} parameters",
            settings=settings.recorded(parameters=count),
            rounds=settings.rounds,
            candidates=found,
        )
    ]


def bench_optimizers(settings: Settings) -> list[Section]:
    """Measures other optimizers, each compared with its plain Optax counterpart."""
    shapes, scales = parameters(settings)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    sgd = optax.sgd(0.1, 0.9, nesterov=True)
    decayed = optax.chain(optax.add_decayed_weights(DECAY), sgd)
    groups: tuple[dict[str, optax.GradientTransformation], ...] = (
        {"optax.adamw": optax.adamw(1e-3), "repopt_adamw": repopt_adamw(1e-3, scales)},
        {"optax.lion": optax.lion(1e-4), "repopt_lion": repopt_lion(1e-4, scales)},
        {
            "optax.sgd": sgd,
            "repopt_mask, optax.sgd": optax.chain(repopt_mask(scales), sgd),
            "reparameterize(optax.sgd)": reparameterize(sgd, scales),
        },
        {
            "optax.sgd with decay": decayed,
            "repopt_sgd with decay": repopt_sgd(0.1, scales, weight_decay=DECAY),
            "reparameterize(optax.sgd with decay)": reparameterize(decayed, scales),
        },
    )
    values = random_like(shapes)
    found: dict[str, Facts] = {}
    for group in groups:  # one group at a time, because ten states at once need much memory
        baseline = next(iter(group))
        LOG.info("optimizers: %s", baseline)
        builders: dict[str, Builder] = {
            # One update in a program, because a loop around `reparameterize` takes minutes to compile.
            name: (lambda tx=tx, baseline=baseline: updating(tx, values, {"baseline": baseline}, repeats=1))
            for name, tx in group.items()
        }
        measured = measure(builders, settings.rounds, dict.fromkeys(group, (baseline,)))
        add_extra_state(measured, dict.fromkeys(group, baseline))
        found |= measured
    return [
        Section(
            part="optimizers",
            title=f"Optimizer update, other optimizers, {settings.model}, {count:,} parameters",
            settings=settings.recorded(parameters=count),
            rounds=settings.rounds,
            candidates=found,
        )
    ]


def parameters(settings: Settings) -> tuple[Any, Scales]:
    """Returns the shapes of the model's parameters, and the depth rule's scales for them."""
    model, shapes = abstract_model("plain", settings)
    return shapes, depth_scales(model)


def check_multipliers(settings: Settings) -> None:
    """Checks that the rule of every layer is a multiplier, which is what the parts measure.

    Raises:
      ValueError: that of a layer is none.
    """
    shapes, scales = parameters(settings)
    try:
        jax.eval_shape(lambda params: gradient_multipliers(params, scales), shapes)
    except ValueError as error:
        raise ValueError(
            f"the parts update and optimizers cannot measure {settings.model} ({error}): name the other parts"
        ) from error


def kernels(params: Any) -> Any:
    """Returns the weight decay mask of a plain network: everything except vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def random_like(shapes: Any) -> Any:
    """Returns small random numbers on the host. Hardware may be faster with zeros."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: 0.01 * rng.standard_normal(s.shape, np.float32), shapes)


def updating(
    tx: optax.GradientTransformation, values: Any, facts: Facts, *, repeats: int = UPDATES
) -> tuple[Candidate, Facts]:
    """Runs updates of parameters and optimizer state in place, `repeats` in a program, from one gradient."""
    params, gradients = owned(values), owned(values)
    state = owned(jax.jit(tx.init)(params))

    def once(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def repeated(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        def body(_: Any, carried: tuple[Any, Any]) -> tuple[Any, Any]:
            return lax.optimization_barrier(once(*carried, gradients))

        return lax.fori_loop(0, repeats, body, (params, state))

    run = jax.jit(once if repeats == 1 else repeated, donate_argnums=(0, 1))
    lowered = run.lower(params, state, gradients)
    compiled = lowered.compile(compiler_options=IN_A_LOOP)
    facts |= {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "largest_constant_bytes": largest_constant(lowered.as_text()),
        **memory(compiled),
    }
    return Candidate(carrying(compiled, [params, state], gradients), repeats=repeats), facts


def owned(tree: Any) -> Any:
    """Copies arrays so that they can be donated: neither the host's memory nor shared."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def copying(size: int) -> tuple[Candidate, Facts]:
    """Copies one array into another existing one: `size` bytes, read and written together."""
    x = jnp.full((size // 8,), 1.5, jnp.float32)
    y = jnp.zeros_like(x)
    copy = jax.jit(lambda y, x: (jnp.copy(x),), donate_argnums=0, keep_unused=True)
    return Candidate(carrying(copy.lower(y, x).compile(), [y], x)), {"moved_bytes": 2 * x.nbytes}


def stored_multiplier(scales: Scales) -> optax.GradientTransformation:
    """The published code's rule: a dense multiplier for every kernel, here kept in the state."""

    def init(params: Any) -> Any:
        return gradient_multipliers(params, scales)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda g, m: g * m, updates, state), state

    return optax.GradientTransformation(init, update)


def add_bandwidth(found: dict[str, Facts]) -> None:
    """Adds bytes/s, and the share of the copy in the same round, to results with "moved_bytes"."""
    for facts in found.values():
        if "ms" not in facts:
            continue
        facts["bytes_per_s"] = 1e3 * facts["moved_bytes"] / facts["ms"]["median"]
        if ratio := facts["ratios"].get(COPY):
            per_byte = facts["moved_bytes"] / found[COPY]["moved_bytes"]
            # The inverses of quartiles are in reverse order.
            turned = {"median": "median", "low": "high", "high": "low"}
            facts["share_of_copy"] = {name: per_byte / ratio[other] for name, other in turned.items()}


def add_extra_state(found: dict[str, Facts], baselines: Mapping[str, str]) -> None:
    for name, base in baselines.items():
        if "state_bytes" in found[name] and "state_bytes" in found[base]:
            found[name]["extra_state_bytes"] = found[name]["state_bytes"] - found[base]["state_bytes"]


def largest_constant(text: str) -> int:
    """Returns the bytes of the largest array literal in a StableHLO program (splats are not literals)."""
    literals: Sequence[str] = [
        *re.findall(r'dense<"0x([0-9A-Fa-f]+)">', text),
        *re.findall(r"dense<\[(.*?)\]>", text),
    ]
    return max((len(literal) // 2 for literal in literals), default=0)
