"""The ablation ladder: what each part of the method adds, CIFAR-10 at a size that a laptop trains.

    config=configs/ladder.py
    data=--config.data.data_dir=cifar10
    repopt search --config=$config:search $data --out=runs/ladder/search-0
    repopt train --config=$config:1-plain $data --out=runs/ladder/1-plain-0
    ...
    repopt train --config=$config:9-frozen $data --out=runs/ladder/9-frozen-0

12,800 images, 5 epochs, 500 steps of 128. Rungs 1 to 7 are those of the RepOptimizer paper (table 4). Rungs 8
and 9 have no search of their own: the network with scaled branches, merged in weight space, is trained on the
task itself, its scales with it, all the time or for a tenth of the steps. Rungs 2, 3, 6 and 7 take the scales
that the first command wrote; `--config.scales=` names others. All nine have the same recipe, without
clipping; the search clips, as published. `scripts/ladder.sh` runs them all.

`data_dir` is an image folder: `train/<class>/*` and `test/<class>/*`, 32x32 pixels. `,smoke` after the
argument (`ladder.py:search,smoke`) runs two short epochs on a few images.
"""

from typing import Any

from repopt_jax.train.config import Config, DataConfig, ModelConfig, OptimConfig

SEARCHED = "runs/ladder/search-0/scales"

# Argument -> kind of network, and what else is its own.
RUNGS: dict[str, tuple[str, dict[str, Any]]] = {
    "search": ("search", {}),
    "1-plain": ("target", {}),
    "2-init": ("target", {"scales": SEARCHED, "rules": "init"}),
    "3-multiplier": ("target", {"scales": SEARCHED, "rules": "multiplier"}),
    "4-ones": ("target", {"scales": "ones"}),
    "5-depth": ("target", {"scales": "depth"}),
    "6-means": ("target", {"scales": SEARCHED, "scales_mean": True}),
    "7-full": ("target", {"scales": SEARCHED}),
    "8-direct": ("search", {}),
    "9-frozen": ("search", {"freeze_scales": 0.1}),
}


def get_config(arg: str = "1-plain") -> Config:
    rung, _, option = (arg or "1-plain").partition(",")
    if rung not in RUNGS or option not in ("", "smoke"):
        raise ValueError(f"argument {arg!r} must be one of {', '.join(RUNGS)}, with or without ',smoke'")
    kind, own = RUNGS[rung]
    config = Config(
        name=f"ladder-{rung}",
        epochs=5,
        batch_size=128,
        eval_batch_size=500,
        eval_every=5,
        log_every=20,
        model=ModelConfig(variant="cifar-small", kind=kind),
        data=DataConfig(
            source="folder",
            image_size=32,
            crop_padding=4,
            flip=True,
            mean=(0.4913, 0.4821, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            train_limit=12_800,
            eval_limit=5_000,
        ),
        optim=OptimConfig(learning_rate=0.1, weight_decay=4e-5, clip_norm=5.0 if rung == "search" else None),
        **own,
    )
    if option == "smoke":
        config.epochs, config.eval_every, config.batch_size, config.log_every = 2, 2, 16, 1
        config.data.train_limit, config.data.eval_limit = 64, 40
        config.eval_batch_size = 32
    return config
