"""Trains two networks, prunes each to half of its multiply-accumulates by ResRep, and writes the accuracies.

    python scripts/resrep.py RUNS                    # the embedded digits, about ten minutes on 2 CPU cores
    python scripts/resrep.py RUNS --images cifar10   # an image folder of 32x32 pixels: hours

RUNS keeps one folder a run; what is finished there is not run again, what was interrupted continues. Writes
OUT.json and OUT.md (`--out`, by default scripts/results/resrep_NAME, of the image folder's name or "digits").

The settings were fixed before any of these networks was pruned, by how far a row has to go: the published
ones (rate 0.01, lasso 1e-4, masks every 200 steps) are for several hundred thousand steps, and here there are
some thousand. So the rate is 5 times, the lasso 10 times as large, and masks are chosen every 10 steps.
Momentum, threshold, rows for each choice and epochs before the first are the published ones.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import shlex
import statistics

import jax
from flax import nnx

from repopt_jax import models, train
from repopt_jax.deploy import prune, prune_config
from repopt_jax.nn.block import block, classifier

NETWORKS = ("vgg-cifar-small", "resnet-14")
TARGET = 0.5
PRUNE = {"strength": 1e-3, "interval": 10}
RATE = 0.05


class Residual(nnx.Module):
    def __init__(self, inputs, outputs, stride, **options):
        self.first = block(inputs, outputs, 3, stride=stride, **options)
        self.second = block(outputs, outputs, 3, activation="none", **options)
        project = stride > 1 or inputs != outputs
        make = {"stride": stride, "activation": "none", **options}
        self.shortcut = nnx.data(block(inputs, outputs, 1, **make) if project else None)

    def __call__(self, x):
        y = self.second(self.first(x))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A CIFAR ResNet: three stages of basic blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks, *, num_classes, in_channels=3, dtype=None, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.stem = block(in_channels, 16, 3, **options)
        made, inputs = [], 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(blocks):
                made.append(Residual(inputs, width, 1 if i else stride, **options))
                inputs = width
        self.blocks = nnx.List(made)
        self.head = classifier(64, num_classes, **options)

    def __call__(self, x):
        x = self.stem(x)
        for residual in self.blocks:
            x = residual(x)
        return self.head(x.mean((1, 2)))


models.register(models.Entry("resnet-14", ResNet, 2))


def configs(name: str, seed: int, images: str | None) -> tuple[train.Config, dict[str, int]]:
    """The config of the plain run, and what pruning changes in it besides the method's settings."""
    base = train.load_config("cifar10_small:plain" if images else "digits:plain")
    data = dataclasses.replace(base.data, data_dir=images or "")
    config = dataclasses.replace(
        base,
        name=name,
        seed=seed,
        epochs=8 if images else 40,
        eval_every=8,
        data=data,
        model=dataclasses.replace(base.model, name=name),
    )
    return config, {"epochs": 20 if images else 160, "eval_every": 20 if images else 40}


def measure(name: str, seed: int, images: str | None, runs: pathlib.Path) -> dict:
    config, changes = configs(name, seed, images)
    plain = runs / f"{name}-{seed}"
    train.run(config, plain, progress=False)
    made = prune_config(plain, target=TARGET)
    made = dataclasses.replace(
        made,
        **changes,
        optim=dataclasses.replace(made.optim, learning_rate=RATE),
        prune=dataclasses.replace(made.prune, **PRUNE),
    )
    out = runs / f"{name}-{seed}-pruned"
    done = prune(made, out, progress=False)
    summary = json.loads((out / "summary.json").read_text())
    fields = dataclasses.asdict(done)
    kept = (
        "macs_before",
        "macs_after",
        "parameters_before",
        "parameters_after",
        "test_before",
        "test_trained",
    )
    kept += ("test_after", "test_count", "max_abs", "max_rel", "masked", "removed", "smallest", "widths")
    run = {field: summary[field] for field in ("steps", "epochs", "versions", "device", "wall_s")}
    return {"network": name, "seed": seed, **{field: fields[field] for field in kept}, "run": run}


def markdown(result: dict) -> str:
    rows = result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["run"]["versions"].items())
    lines = [
        f"# ResRep on {result['data']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['hardware']}; {versions}. Target: {TARGET:.0%} of the multiply-accumulates. "
        f"{result['epochs'][0]} epochs plain, then {result['epochs'][1]} with compactors "
        f"({rows[0]['run']['steps']:,} steps): rate {RATE:g}, lasso {PRUNE['strength']:g}, masks every "
        f"{PRUNE['interval']} steps, the rest as published. {rows[0]['test_count']:,} test images.",
        "",
        "| network | seed | multiply-accumulates | kept | channels masked, removed | accuracy before, % "
        "| with compactors | after | output difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tests = (row[field]["accuracy"] for field in ("test_before", "test_trained", "test_after"))
        lines.append(
            f"| {row['network']} | {row['seed']} | {row['macs_before']:,} to {row['macs_after']:,} "
            f"| {row['macs_after'] / row['macs_before']:.1%} | {row['masked']}, {row['removed']} | "
            + " | ".join(f"{100 * test:.2f}" for test in tests)
            + f" | {row['max_rel']:.1e} |"
        )
    lines += [""]
    for name in NETWORKS:
        own = [row for row in rows if row["network"] == name]
        if not own:
            continue
        change = [100 * (r["test_after"]["accuracy"] - r["test_before"]["accuracy"]) for r in own]
        seeds = "one seed" if len(own) == 1 else f"{len(own)} seeds"
        lines.append(f"{name}: {statistics.mean(change):+.2f} points on average, {seeds}.")
    lines += [
        "",
        "Training goes on while rows go: what a network gains is that of the epochs with compactors, for "
        "which there is no run without pruning beside.",
        "",
        "Outputs of each layer, before and after (first seed):",
        "",
    ]
    for name in NETWORKS:
        for row in [row for row in rows if row["network"] == name][:1]:
            widths = ", ".join(
                f"{path} {w[1]} to {w[3]}" for path, w in row["widths"].items() if w[1] != w[3]
            )
            lines += [f"- {name}: {widths}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--images", metavar="DIR", help="train/<class>/*, test/<class>/*, 32x32 pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--hardware", default="", help="for the results file")
    parser.add_argument("--out", type=pathlib.Path, help="path without suffix")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name = pathlib.Path(args.images).name if args.images else "digits"
    out = args.out or pathlib.Path("scripts/results") / f"resrep_{name}"
    options = ["--images", name] if args.images else []
    if args.seeds != parser.get_default("seeds"):
        options += ["--seeds", *map(str, args.seeds)]
    plain, changes = configs(NETWORKS[0], 0, args.images)
    rows: list[dict] = []
    result = {
        "data": f"the images of {name}" if args.images else "the embedded digits",
        "command": shlex.join(["python", "scripts/resrep.py", "RUNS", *options]),
        "hardware": args.hardware or f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "epochs": (plain.epochs, changes["epochs"]),
        "settings": {"target": TARGET, "rate": RATE, **PRUNE},
        "rows": rows,
    }
    for seed in args.seeds:
        for name in args.networks:
            rows.append(measure(name, seed, args.images, args.runs))
            out.parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(f"{out}.json").write_text(json.dumps(result, indent=1))
            pathlib.Path(f"{out}.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
