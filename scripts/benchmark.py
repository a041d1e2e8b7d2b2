"""What the rule costs: optimizer update and training step, beside what they are compared with.

    python scripts/benchmark.py update
    python scripts/benchmark.py step
    python scripts/benchmark.py all --out scripts/results/benchmark_cpu
    python scripts/benchmark.py optimizers --out scripts/results/benchmark_optimizers_cpu

`update`: plain SGD, `repopt_mask` and a stored multiplier on the 51.8 million parameters of RepOpt-VGG-B1.
`optimizers`: AdamW, Lion and `reparameterize` on the same, each beside its plain Optax counterpart.
`step`: a training step of a plain network, of CSLA merged in weight space and branch by branch, of RepVGG.

Candidates run in turn, in every round in another order, and each is compared with the plain one of its own
round: the median of these ratios is little moved by a busy machine. Peak memory is what the compiler reserves
for the program: arguments, results and temporaries. Writes OUT.json and OUT.md where `--out` is given.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import repopt_jax
from repopt_jax.models import VGG_VARIANTS, RepOptVGG
from repopt_jax.train.state import init_state, make_train_step, split_model

DECAY = 4e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("update", "optimizers", "step", "all"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", default="", help="path without suffix for the results")
    args = parser.parse_args()
    if args.out:
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"command": f"python scripts/benchmark.py {args.part} --rounds {args.rounds}"}
    results["machine"] = machine()
    if args.part in ("update", "all"):
        results["update"] = bench_update(args.rounds)
    if args.part in ("optimizers", "all"):
        results["optimizers"] = bench_optimizers(args.rounds)
    if args.part in ("step", "all"):
        results["step"] = {
            "cifar-small, 128 images of 32 px": bench_step("cifar-small", 128, 32, args.rounds),
            "B1, 4 images of 64 px": bench_step("B1", 4, 64, max(args.rounds // 3, 5)),
        }
    text = markdown(results)
    print(text)
    if args.out:
        with open(f"{args.out}.json", "w") as file:
            json.dump(results, file, indent=1)
        with open(f"{args.out}.md", "w") as file:
            file.write(text)


def bench_update(rounds: int) -> dict[str, Any]:
    """One update of RepOpt-VGG-B1 by Nesterov SGD with decay."""
    shapes, scales = b1()

    def rule(first):
        return optax.chain(first, optax.add_decayed_weights(DECAY), optax.sgd(0.1, 0.9, nesterov=True))

    chains = {
        "plain SGD": rule(optax.identity()),
        "repopt_mask": rule(repopt_jax.repopt_mask(scales)),
        "stored multiplier": rule(stored_multiplier(scales)),
    }
    return time_updates(chains, dict.fromkeys(chains, "plain SGD"), shapes, rounds)


def bench_optimizers(rounds: int) -> dict[str, Any]:
    """One update of RepOpt-VGG-B1 by other optimizers, each beside the plain one."""
    shapes, scales = b1()
    sgd = optax.sgd(0.1, 0.9, nesterov=True)
    decayed = optax.chain(optax.add_decayed_weights(DECAY), sgd)
    groups = (
        {"optax.adamw": optax.adamw(1e-3), "repopt_adamw": repopt_jax.repopt_adamw(1e-3, scales)},
        {"optax.lion": optax.lion(1e-4), "repopt_lion": repopt_jax.repopt_lion(1e-4, scales)},
        {
            "optax.sgd": sgd,
            "repopt_mask, optax.sgd": optax.chain(repopt_jax.repopt_mask(scales), sgd),
            "reparameterize(optax.sgd)": repopt_jax.reparameterize(sgd, scales),
        },
        {
            "optax.sgd with decay": decayed,
            "repopt_sgd with decay": repopt_jax.repopt_sgd(0.1, scales, weight_decay=DECAY),
            "reparameterize(optax.sgd with decay)": repopt_jax.reparameterize(decayed, scales),
        },
    )
    chains = {name: tx for group in groups for name, tx in group.items()}
    baselines = {name: next(iter(group)) for group in groups for name in group}
    return time_updates(chains, baselines, shapes, rounds)


def b1() -> tuple[Any, repopt_jax.Scales]:
    """Shapes of the parameters of RepOpt-VGG-B1, and scales for them."""
    abstract = nnx.eval_shape(lambda: RepOptVGG(VGG_VARIANTS["B1"], num_classes=1000, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(abstract, nnx.Param)), abstract.depth_scales()


def time_updates(chains, baselines: dict[str, str], shapes, rounds: int) -> dict[str, Any]:
    """One update and its application, float32, parameters and state donated."""

    def zeros():
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    gradients = jax.tree.map(lambda s: jnp.full(s.shape, 1e-3, s.dtype), shapes)
    runs, facts = {}, {}
    for name, tx in chains.items():
        params = zeros()
        state = tx.init(params)

        def update(params, state, g, tx=tx):
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state

        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, gradients)
        compiled = lowered.compile()
        facts[name] = {
            "baseline": baselines[name],
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            "largest_constant_bytes": largest_constant(lowered.as_text()),
            "program_bytes": len(lowered.as_text()),
            **memory(compiled),
        }
        runs[name] = stepper(compiled, [params, state], gradients)
    times = interleave(runs, rounds)
    for fact in facts.values():
        fact["extra_state_bytes"] = fact["state_bytes"] - facts[fact["baseline"]]["state_bytes"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return {"parameters": count, "rounds": rounds, "candidates": with_ratios(times, facts, baselines)}


def stored_multiplier(scales) -> optax.GradientTransformation:
    """What the published code does: a dense multiplier of the kernel's size for every kernel, here in the
    state."""

    def init(params):
        return repopt_jax.gradient_multipliers(params, scales)

    def update(updates, state, params=None):
        return jax.tree.map(lambda g, m: g * m, updates, state), state

    return optax.GradientTransformation(init, update)


def bench_step(variant: str, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """A whole training step (forward, backward, update, batch norm in training mode), float32, equal
    batch."""
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    batch_of = {"image": images, "label": jnp.arange(batch) % 10}
    options = {
        "plain": {"kind": "target"},
        "plain with repopt_mask": {"kind": "target"},
        "CSLA, merged in weight space": {"kind": "search"},
        "CSLA, branch by branch": {"kind": "search", "form": "branches"},
        "RepVGG": {"kind": "repvgg"},
    }
    runs, facts = {}, {}
    for name, option in options.items():
        model = RepOptVGG(VGG_VARIANTS[variant], num_classes=10, rngs=nnx.Rngs(0), **option)
        first = repopt_jax.repopt_mask(model.depth_scales()) if "mask" in name else optax.identity()
        tx = optax.chain(first, optax.add_decayed_weights(DECAY), optax.sgd(0.01, 0.9, nesterov=True))
        network = split_model(model)
        state = init_state(network, tx)
        step = make_train_step(network.graphdef, tx, optax.constant_schedule(0.01))
        compiled = step.lower(state, batch_of).compile()
        facts[name] = memory(compiled)
        runs[name] = stepper(compiled, [state], batch_of)
    return {
        "rounds": rounds,
        "candidates": with_ratios(interleave(runs, rounds), facts, dict.fromkeys(runs, "plain")),
    }


def stepper(compiled, carried: list, argument) -> Callable[[], None]:
    """A function without arguments that runs one step on its own state and waits for it."""

    def run():
        out = compiled(*carried, argument)
        carried[:] = out[: len(carried)]
        jax.block_until_ready(out)

    return run


def interleave(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for i in range(-2, rounds):
        random.Random(i).shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def with_ratios(times, facts, baselines: dict[str, str]) -> dict[str, Any]:
    """Median time, and the median and quartiles of the ratio to the baseline's time in the same round."""
    table = {}
    for name, seconds in times.items():
        ratios = [t / b for t, b in zip(seconds, times[baselines[name]])]
        low, _, high = statistics.quantiles(ratios, n=4)
        table[name] = {
            "ms_median": 1e3 * statistics.median(seconds),
            "ms_min": 1e3 * min(seconds),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            "ratio_of_minima": min(seconds) / min(times[baselines[name]]),
            **facts[name],
        }
    return table


def memory(compiled) -> dict[str, int]:
    """Bytes that the compiler reserves; an argument that is donated is counted once."""
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return {"temporary_bytes": m.temp_size_in_bytes, "peak_bytes": total}


def largest_constant(text: str) -> int:
    """Bytes of the largest array written out in a StableHLO program (one repeated number is not an array)."""
    literals = re.findall(r'dense<"0x([0-9A-Fa-f]+)">', text) + re.findall(r"dense<\[(.*?)\]>", text)
    return max((len(literal) // 2 for literal in literals), default=0)


def machine() -> dict[str, Any]:
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "repopt_jax": repopt_jax.__version__,
    }


def markdown(results: dict[str, Any]) -> str:
    m = results["machine"]
    lines = [
        "# Benchmark",
        "",
        f"`{results['command']}`",
        "",
        f"{m['device']}, {m['cores']} cores; Python {m['python']}, jax {m['jax']}, flax {m['flax']}, "
        f"optax {m['optax']}, repopt_jax {m['repopt_jax']}. Ratios: median over the rounds (quartiles).",
        "",
    ]
    for part in ("update", "optimizers"):
        if part not in results:
            continue
        update, what = results[part], "SGD" if part == "update" else "other optimizers"
        lines += [
            f"## Optimizer update, {what}, {update['parameters']:,} parameters, {update['rounds']} rounds",
            "",
            "| | compared with | ms, median | ms, best | ratio | state, bytes | more than it, bytes | "
            "largest constant, bytes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, c in update["candidates"].items():
            lines.append(
                f"| {name} | {c['baseline']} | {c['ms_median']:.1f} | {c['ms_min']:.1f} | {ratio(c)} | "
                f"{c['state_bytes']:,} | {c['extra_state_bytes']:,} | {c['largest_constant_bytes']:,} |"
            )
        lines.append("")
    for title, part in results.get("step", {}).items():
        lines += [
            f"## Training step, {title}, {part['rounds']} rounds",
            "",
            "| | ms, median | ms, best | ratio to plain | peak memory, MB | of it temporaries, MB |",
            "|---|---|---|---|---|---|",
        ]
        for name, c in part["candidates"].items():
            lines.append(
                f"| {name} | {c['ms_median']:.1f} | {c['ms_min']:.1f} | {ratio(c)} | "
                f"{c['peak_bytes'] / 1e6:.1f} | {c['temporary_bytes'] / 1e6:.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def ratio(c: dict[str, Any]) -> str:
    low, high = c["ratio_quartiles"]
    return f"{c['ratio_median']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
