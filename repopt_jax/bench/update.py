"""What the rule costs in the optimizer: one update of all parameters, beside a copy of as many bytes.

SGD with momentum reads gradient, parameter and momentum and writes the last two: 20 bytes a float32
parameter. A dense multiplier is one array more to read: 24. Nothing is faster than the memory, so that the
share of a copy's bandwidth says what is left to gain.
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
# Updates in one program: a GPU takes less time for one than the host for handing 400 arrays over.
UPDATES = 4
# An update in a loop must do what it does in a step: build the multiplier, not find it built before the loop.
IN_A_LOOP: dict[str, str | bool] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
DECAY = 4e-5
COPY = "copy"


def bench_update(settings: Settings) -> list[Section]:
    """Nesterov SGD with decay as the trainer makes it: plain, with `repopt_mask`, and with the multiplier
    stored."""
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
    """Other optimizers, each beside its plain Optax counterpart."""
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
    for group in groups:  # a group at a time: ten states at once are a lot of memory
        baseline = next(iter(group))
        LOG.info("optimizers: %s", baseline)
        builders: dict[str, Builder] = {
            # One at a time: a loop around `reparameterize` takes minutes to compile.
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
    """Shapes of the variant's trained arrays, and scales by the depth rule for them."""
    model, shapes = abstract_model("plain", settings)
    return shapes, depth_scales(model)


def kernels(params: Any) -> Any:
    """The mask of weight decay for a plain network: everything but vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def random_like(shapes: Any) -> Any:
    """Small random numbers, on the host. Not zeros: hardware may be faster with them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: 0.01 * rng.standard_normal(s.shape, np.float32), shapes)


def updating(
    tx: optax.GradientTransformation, values: Any, facts: Facts, *, repeats: int = UPDATES
) -> tuple[Candidate, Facts]:
    """Updates of parameters and optimizer state in place, `repeats` in one program, from one gradient."""
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
    """Copies, which may be given away: not the host's memory, and not two names of one array."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def copying(size: int) -> tuple[Candidate, Facts]:
    """A copy of one array into another that is there already: `size` bytes read and written together."""
    x = jnp.full((size // 8,), 1.5, jnp.float32)
    y = jnp.zeros_like(x)
    copy = jax.jit(lambda y, x: (jnp.copy(x),), donate_argnums=0, keep_unused=True)
    return Candidate(carrying(copy.lower(y, x).compile(), [y], x)), {"moved_bytes": 2 * x.nbytes}


def stored_multiplier(scales: Scales) -> optax.GradientTransformation:
    """What the published code does: a dense multiplier of the kernel's size for every kernel, here in the
    state."""

    def init(params: Any) -> Any:
        return gradient_multipliers(params, scales)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda g, m: g * m, updates, state), state

    return optax.GradientTransformation(init, update)


def add_bandwidth(found: dict[str, Facts]) -> None:
    """Adds bytes a second, and the share of the copy's in the same round, to what has "moved_bytes"."""
    for facts in found.values():
        if "ms" not in facts:
            continue
        facts["bytes_per_s"] = 1e3 * facts["moved_bytes"] / facts["ms"]["median"]
        if ratio := facts["ratios"].get(COPY):
            per_byte = facts["moved_bytes"] / found[COPY]["moved_bytes"]
            # Of quartiles the inverses change places.
            turned = {"median": "median", "low": "high", "high": "low"}
            facts["share_of_copy"] = {name: per_byte / ratio[other] for name, other in turned.items()}


def add_extra_state(found: dict[str, Facts], baselines: Mapping[str, str]) -> None:
    for name, base in baselines.items():
        if "state_bytes" in found[name] and "state_bytes" in found[base]:
            found[name]["extra_state_bytes"] = found[name]["state_bytes"] - found[base]["state_bytes"]


def largest_constant(text: str) -> int:
    """Bytes of the largest array written out in a StableHLO program (one repeated number is not an array)."""
    literals: Sequence[str] = [
        *re.findall(r'dense<"0x([0-9A-Fa-f]+)">', text),
        *re.findall(r"dense<\[(.*?)\]>", text),
    ]
    return max((len(literal) // 2 for literal in literals), default=0)
