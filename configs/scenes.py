"""A detector with keypoints on 64x64 scenes of handwritten digits, with an argument for each mode.

    repopt quickstart --config=scenes --out=runs/scenes

makes all of them. By hand:

    repopt search --config=configs/scenes.py:search --out=runs/scenes/search
    repopt train --config=configs/scenes.py:repopt --out=runs/scenes/repopt
    repopt train --config=configs/scenes.py:plain --out=runs/scenes/plain
    repopt train --config=configs/scenes.py:repvgg --out=runs/scenes/repvgg

`repopt` takes the scales that the first command wrote; `--config.scales=` names others. `,smoke` after the
argument (`scenes.py:search,smoke`) runs two short epochs on a few scenes.
"""

from repopt_jax.train.config import (
    Config,
    DataConfig,
    DetectConfig,
    ModelConfig,
    OptimConfig,
    parse_argument,
    smoke,
)

# Mode -> scales.
RUNS = {"plain": "", "search": "", "repopt": "runs/scenes/search/scales", "repvgg": ""}


def get_config(arg: str = "") -> Config:
    mode, small = parse_argument(arg, RUNS)
    config = Config(
        name=f"scenes-{mode}",
        task="detect",
        epochs=10,
        batch_size=16,
        eval_batch_size=32,
        scales=RUNS[mode],
        log_every=20,
        eval_every=2,
        model=ModelConfig(name="fcos-scenes", mode=mode, activation="relu6"),
        data=DataConfig(source="scenes", image_size=64, mean=(0.3,), std=(0.25,)),
        optim=OptimConfig(learning_rate=0.04, weight_decay=1e-4, warmup_epochs=1, clip_norm=10.0),
        detect=DetectConfig(level_range=4.0),
    )
    return smoke(config) if small else config
