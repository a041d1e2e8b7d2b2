"""The ablation ladder: what each part of the method adds, CIFAR-10 at a size that a laptop trains.

    config=configs/ladder.py
    data=--config.data.data_dir=cifar10
    repopt search --config=$config:search $data --out=runs/ladder/search-0
    repopt train --config=$config:1-plain $data --out=runs/ladder/1-plain-0
    ...
    repopt train --config=$config:9-frozen $data --out=runs/ladder/9-frozen-0

The recipe of `cifar10_small` with 12,800 images and 5 epochs, 500 steps of 128. Rungs 1 to 7 are those of the
RepOptimizer paper (table 4). Rungs 8 and 9 have no separate search: the network with scaled branches, merged
in weight space, is trained on the task itself, and its scales with it, throughout or for a tenth of the
steps. Rungs 2, 3, 6 and 7 take the scales that the first command wrote; `--config.scales=` names others. All
nine have the same recipe, without clipping; the search clips, as published. `repopt compare --config=ladder`
runs them with three seeds, and `scripts/ladder.sh` with the options that the results here were made with.

`data_dir` is an image folder: `train/<class>/*` and `test/<class>/*`, 32x32 pixels. `,smoke` after the
argument (`ladder.py:search,smoke`) runs two short epochs on a few embedded digits.
"""

import dataclasses
from typing import Any

from repopt_jax.report.comparison import Comparison, smoke_of
from repopt_jax.train.config import Config, load_config, parse_argument, smoke

SEARCHED = "runs/ladder/search-0/scales"

# Argument -> run of cifar10_small whose recipe it uses, and its changes.
RUNGS: dict[str, tuple[str, dict[str, Any]]] = {
    "search": ("search", {}),
    "1-plain": ("plain", {}),
    "2-init": ("repopt", {"scales": SEARCHED, "rules": "init"}),
    "3-multiplier": ("repopt", {"scales": SEARCHED, "rules": "multiplier"}),
    "4-ones": ("repopt", {"scales": "ones"}),
    "5-depth": ("repopt", {"scales": "depth"}),
    "6-means": ("repopt", {"scales": SEARCHED, "scales_mean": True}),
    "7-full": ("repopt", {"scales": SEARCHED}),
    "8-direct": ("search", {}),
    "9-frozen": ("search", {"freeze_scales": 0.1}),
}


def get_config(arg: str = "") -> Config:
    rung, small = parse_argument(arg, RUNGS, default="1-plain")
    recipe, own = RUNGS[rung]
    config = load_config(f"cifar10_small:{recipe}")
    config = dataclasses.replace(config, name=f"ladder-{rung}", epochs=5, eval_every=5, **own)
    config.data.train_limit = 12_800
    if rung != "search":
        config.optim.clip_norm = None
    return smoke(config) if small else config


def get_comparison(arg: str = "") -> Comparison:
    """The nine rungs, three seeds each, all by the same recipe; one search for those that take its scales."""
    _, small = parse_argument(arg, ("rungs",))
    ways = {rung: get_config(rung) for rung in RUNGS if rung != "search"}
    for config in ways.values():
        config.scales = config.scales.replace(SEARCHED, "search:search")
    comparison = Comparison(
        title="The ablation ladder on CIFAR-10", ways=ways, searches={"search": get_config("search")}
    )
    return smoke_of(comparison) if small else comparison
