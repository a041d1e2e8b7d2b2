"""Made-up searches: scale records of channels that follow given paths, and learning rates to go with them."""

import numpy as np

from repopt_jax.report.records import history_of

EPOCHS = 20
STEPS = 100  # in an epoch


def records(paths, *, negative=0):
    """Scale records of channels that follow `paths`: {(layer, branch): (epochs + 1, channels)}."""
    made = []
    for epoch in range(EPOCHS + 1):
        layers = {}
        for (layer, branch), values in paths.items():
            now, before = values[epoch], values[max(epoch - 1, 0)]
            layers.setdefault(layer, {})[branch] = {
                "mean": float(now.mean()),
                "std": float(now.std()),
                "min": float(now.min()),
                "max": float(now.max()),
                "negative": negative,
                "rms": float(np.sqrt((now**2).mean())),
                "rms_change": float(np.sqrt(((now - before) ** 2).mean())),
            }
        made.append({"kind": "scales", "step": epoch * STEPS, "epoch": epoch, "layers": layers})
    return made


def train_records(rate):
    return [
        {
            "kind": "train",
            "step": step,
            "epoch": step / STEPS,
            "lr": rate(step / STEPS / EPOCHS),
            "images_per_s": 1000.0,
            "data_wait": 0.0,
        }
        for step in range(0, EPOCHS * STEPS + 1, 10)
    ]


def cosine(x):
    return 0.05 * (1 + np.cos(np.pi * x))


def constant(x):
    return 0.1


def search(shape, rate=constant, *, layers=4, size=0.5, negative=0):
    """A search in which every vector goes from 1 to 1 + size * shape(time)."""
    time = np.linspace(0, 1, EPOCHS + 1)
    way = 1 + size * shape(time)[:, None] * np.linspace(0.5, 1.5, 8)
    paths = {(f"stages/{i}/0/conv", b): way for i in range(layers) for b in ("3x3", "1x1")}
    return paths, history_of(records(paths, negative=negative), train_records(rate))


def full_rate_time(x):
    """How much of a cosine schedule's budget is spent at time x, both from 0 to 1."""
    return x + np.sin(np.pi * x) / np.pi
