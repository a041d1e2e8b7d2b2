"""Fine-tunes a pretrained ResNet-18 in plain Flax: plain, with the mask, and with trainable scales online.

    python scripts/finetune_resnet.py RUNS --images cifar10    # about half an hour on 2 CPU cores

The network is trained on one part of the images of a folder and fine-tuned on another. All three ways begin
at the same kernels: the mask takes them as they are, and online splits each into branches that merge into it.
RUNS keeps the pretrained arrays and what each run came to; what is there is not run again. Writes OUT.json
and OUT.md (`--out`, by default scripts/results/finetune_resnet).

All settings were fixed before any result was read: three rates for every way, chosen on held-out training
images with the first seed; the test images are read for the chosen runs only.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fast_on_cpu import ResNet18
from flax import nnx
from orbax.checkpoint import v1 as ocp

import repopt_jax as rj
from repopt_jax.data import Source, Transform, eval_batches, open_folder, train_batches
from repopt_jax.data.dataset import Part
from repopt_jax.report.statistics import difference

PRETRAIN, TUNE, VALIDATION, TEST = 20_480, 12_800, 2_560, 5_000
PRETRAIN_EPOCHS, EPOCHS, BATCH = 6, 3, 128
PRETRAIN_RATE, RATES, SEEDS = 0.1, (0.003, 0.01, 0.03), (0, 1, 2)
DECAY, MOMENTUM = 1e-4, 0.9
WAYS = {
    "plain": "plain SGD",
    "mask": "with repopt_mask, depth rule",
    "online": "online, RepVGG's branches with trainable scales",
}
CIFAR = {"mean": (0.4913, 0.4821, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
TRANSFORM = Transform(image_size=32, crop_padding=4, flip=True, **CIFAR)


def parts(images: str) -> dict[str, Source]:
    """Disjoint parts of the training images: to train on, to fine-tune on (with those held out), and these
    with the test images."""
    source = open_folder(images)
    order = np.random.default_rng(0).permutation(len(source.train))
    ends = np.cumsum([PRETRAIN, TUNE, VALIDATION])
    first, tune, held = (Part(source.train, np.sort(part)) for part in np.split(order, ends)[:3])
    made = {"pretrain": (first, held), "tune": (tune, held), "test": (tune, source.eval)}
    return {
        name: Source(replace(source.info, num_train=len(train), num_eval=len(test)), train=train, eval=test)
        for name, (train, test) in made.items()
    }


@nnx.jit
def logits_of(model, images):
    return model(images)


@nnx.jit
def step(model, optimizer, batch):
    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
        return losses.mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def fit(model, source, rate, epochs, seed, mask=None):
    steps = epochs * (len(source.train) // BATCH)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    decay = optax.add_decayed_weights(DECAY, rj.weight_decay_mask(model))
    tx = optax.chain(decay, optax.sgd(schedule, MOMENTUM, nesterov=True))
    optimizer = nnx.Optimizer(model, tx if mask is None else optax.chain(mask, tx), wrt=nnx.Param)
    model.train()
    batches = iter(train_batches(source, TRANSFORM, batch_size=BATCH, seed=seed))
    losses = [step(model, optimizer, jax.tree.map(jnp.asarray, next(batches))) for _ in range(steps)]
    batches.close()
    return float(losses[-1])


def accuracy(model, source, limit=None):
    model.eval()
    right = count = 0.0
    for batch in eval_batches(source, TRANSFORM, batch_size=512, limit=limit):
        found = np.asarray(logits_of(model, jnp.asarray(batch["image"]))).argmax(-1)
        right += float(((found == batch["label"]) * batch["mask"]).sum())
        count += float(batch["mask"].sum())
    return 100 * right / count


def pretrained(source, folder):
    """The network that all ways begin with, trained now or before."""
    model = rj.fast_on_cpu(ResNet18(source.info.num_classes, rngs=nnx.Rngs(0)))
    path = folder / "pretrained"
    if not path.exists():
        fit(model, source, PRETRAIN_RATE, PRETRAIN_EPOCHS, seed=0)
        ocp.save(str(path), nnx.to_pure_dict(nnx.state(model)))
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, ocp.load(str(path), nnx.to_pure_dict(state)))
    nnx.update(model, state)
    return model


def started(way, model):
    """The network of a way, with the kernels of `model`, and the mask of its gradients."""
    if way == "online":
        keep = {"keep": "split", "trained": True}
        return rj.prepare(model, "online", rngs=nnx.Rngs(0), **keep).model, None
    return nnx.clone(model), rj.repopt_mask(rj.depth_scales(model)) if way == "mask" else None


def run(way, rate, seed, model, sources, file):
    """Fine-tunes once, unless it has been done, and returns the accuracy on the held-out images."""
    if not file.exists():
        network, mask = started(way, model)
        images = next(iter(eval_batches(sources["tune"], TRANSFORM, batch_size=256)))["image"]
        before = [logits_of(net, jnp.asarray(images)) for net in (model, network)]
        done = {
            "way": way,
            "rate": rate,
            "seed": seed,
            "logits_at_0": float(jnp.abs(before[1] - before[0]).max() / jnp.abs(before[0]).max()),
            "loss": fit(network, sources["tune"], rate, EPOCHS, seed, mask),
            "validation": accuracy(network, sources["tune"]),
        }
        ocp.save(str(file.with_suffix("")), nnx.to_pure_dict(nnx.state(network)), overwrite=True)
        file.write_text(json.dumps(done))
    return json.loads(file.read_text())


def tested(way, file, model, sources):
    """The accuracy on the test images of a run that has been chosen."""
    network, _ = started(way, model)
    state = nnx.state(network)
    arrays = ocp.load(str(file.with_suffix("")), nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, arrays)
    nnx.update(network, state)
    return accuracy(network, sources["test"], TEST)


def markdown(result):
    lines = [
        "# Fine-tuning a pretrained ResNet-18",
        "",
        f"`{result['command']}`",
        "",
        f"{result['hardware']}; {result['versions']}. ResNet-18 at 32 pixels, pretrained on {PRETRAIN:,} "
        f"images for {PRETRAIN_EPOCHS} epochs, fine-tuned on {TUNE:,} others for {EPOCHS} epochs of batches "
        f"of {BATCH} (Nesterov {MOMENTUM}, decay {DECAY:g}, cosine). Rates {', '.join(map(str, RATES))}, "
        f"chosen for each way on {VALIDATION:,} held-out images with seed 0; {TEST:,} test images, read for "
        f"the chosen runs only. Before fine-tuning: {result['before']:.2f} % of the test images.",
        "",
        "| way | logits at step 0, relative difference | validation at "
        + ", ".join(map(str, RATES))
        + " | chosen | test accuracy, % | by seed |",
        "|---|---|---|---|---|---|",
    ]
    for way, row in result["ways"].items():
        seeds = ", ".join(f"{value:.2f}" for value in row["test"].values())
        tuned = ", ".join(f"{value:.2f}" for value in row["validation"])
        mean = statistics.fmean(row["test"].values())
        lines.append(
            f"| {WAYS[way]} | {row['logits_at_0']:.1e} | {tuned} | {row['chosen']:g} | {mean:.2f} | {seeds} |"
        )
    lines += ["", "Paired differences in test accuracy, points, with 95 % intervals:", ""]
    for one, other in (("mask", "plain"), ("online", "plain"), ("online", "mask")):
        first, second = (result["ways"][way]["test"] for way in (one, other))
        d = difference(one, other, first, second)
        shown = "" if d.shown else "; not shown"
        lines.append(f"- {one} minus {other}: {d.mean:+.2f} ({d.low:+.2f} to {d.high:+.2f}{shown})")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument(
        "--images", metavar="DIR", required=True, help="train/<class>/*, test/<class>/*, 32x32 pixels"
    )
    parser.add_argument("--hardware", default="", help="for the results file")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scripts/results/finetune_resnet"))
    args = parser.parse_args()
    runs = args.runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    sources = parts(args.images)
    model = pretrained(sources["pretrain"], runs)
    once = functools.partial(run, model=model, sources=sources)
    ways = {}
    for way in WAYS:
        tuned = [once(way, rate, SEEDS[0], file=runs / f"{way}-{rate}-{SEEDS[0]}.json") for rate in RATES]
        chosen = max(tuned, key=lambda done: done["validation"])["rate"]
        for seed in SEEDS:
            once(way, chosen, seed, file=runs / f"{way}-{chosen}-{seed}.json")
        ways[way] = {
            "logits_at_0": max(done["logits_at_0"] for done in tuned),
            "validation": [done["validation"] for done in tuned],
            "chosen": chosen,
        }
    for way, row in ways.items():  # when all is trained
        files = {seed: runs / f"{way}-{row['chosen']}-{seed}.json" for seed in SEEDS}
        row["test"] = {seed: tested(way, file, model, sources) for seed, file in files.items()}
    result = {
        "command": "python scripts/finetune_resnet.py RUNS --images DIR",
        "hardware": args.hardware or f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": f"Python {sys.version.split()[0]}, jax {jax.__version__}, repopt_jax {rj.__version__}",
        "before": accuracy(model, sources["test"], TEST),
        "ways": ways,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    pathlib.Path(f"{args.out}.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
