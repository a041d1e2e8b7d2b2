"""The embedded handwritten digits, 8x8 pixels, five runs of the same length.

    repopt search --config=configs/digits.py:search --out=runs/digits/search
    repopt train --config=configs/digits.py:plain --out=runs/digits/plain
    repopt train --config=configs/digits.py:repopt --out=runs/digits/repopt
    repopt train --config=configs/digits.py:depth --out=runs/digits/depth
    repopt train --config=configs/digits.py:repvgg --out=runs/digits/repvgg

`repopt` takes the scales that the first command wrote; `--config.scales=` names others. `,smoke` after the
argument (`digits.py:search,smoke`) runs two short epochs on a few images.
"""

from repopt_jax.train.config import Config, DataConfig, ModelConfig, OptimConfig, parse_argument, smoke

# Argument -> mode, scales.
RUNS = {
    "plain": ("plain", ""),
    "search": ("search", ""),
    "repopt": ("repopt", "runs/digits/search/scales"),
    "depth": ("repopt", "depth"),
    "repvgg": ("repvgg", ""),
}


def get_config(arg: str = "") -> Config:
    run, small = parse_argument(arg, RUNS)
    mode, scales = RUNS[run]
    config = Config(
        name=f"digits-{run}",
        epochs=20,
        batch_size=64,
        eval_batch_size=256,
        scales=scales,
        log_every=10,
        model=ModelConfig(name="vgg-digits", mode=mode),
        data=DataConfig(source="digits", image_size=8, crop_padding=1, mean=(0.3,), std=(0.37,)),
        # One epoch of warm-up keeps the first steps small.
        optim=OptimConfig(learning_rate=0.1, weight_decay=4e-5, warmup_epochs=1),
    )
    return smoke(config) if small else config
