"""What the files of `configs/` share: how their argument is read, and any recipe made so small that it runs
in seconds.

A config file's argument names one of its runs. `,smoke` after it (`digits.py:search,smoke`) asks for `smoke`
of that run.
"""

import dataclasses
from collections.abc import Iterable

from repopt_jax import models
from repopt_jax.hints import did_you_mean
from repopt_jax.train.config import NAMED_SCALES, Config, DataConfig

# The network that stands for the others made by the same function.
SMALLEST = {
    models.vgg: "vgg-digits",
    models.ghostnet: "repghost-digits",
    models.mobileone: "mobileone-digits",
}
# Side of the images: the digits' own. Detectors need more.
SIDE = 8


def parse_argument(arg: str, choices: Iterable[str], default: str | None = None) -> tuple[str, bool]:
    """(run, whether `,smoke` follows it) of a config file's argument; an empty one means `default`, or else
    the first choice.

    Raises:
      ValueError: no such run, with the nearest one, or something else after the comma.
    """
    choices = tuple(choices)
    name, _, option = arg.partition(",")
    name = name or default or choices[0]
    if name not in choices:
        meant = did_you_mean(name, choices)
        raise ValueError(f"argument {arg!r}{meant} must be one of {', '.join(choices)}, or that and ',smoke'")
    if option not in ("", "smoke"):
        raise ValueError(f"argument {arg!r} ends in {option!r}: only ',smoke' can follow the run")
    return name, option == "smoke"


def smoke(config: Config) -> Config:
    """The same recipe as a run of seconds that needs no data: two epochs of a network of its family that
    fits the embedded digits, on a few of them; or on a few scenes.

    Mode, optimizer, schedule, augmentation, mixing, dtype, accumulation, moving average and mesh stay as they
    are. Scales from a folder become those of the depth rule, for there is no search to take them from;
    lengths in pixels and epochs shrink with the image and the run. A detector keeps its network. The given
    config is left as it is.
    """
    optim = dataclasses.replace(config.optim, warmup_epochs=min(config.optim.warmup_epochs, 1.0))
    named = config.scales in ("", *NAMED_SCALES)
    small = dataclasses.replace(
        config,
        name=f"{config.name}-smoke",
        epochs=2,
        eval_every=1,
        log_every=1,
        checkpoint_every=0,
        published=None,
        scales=config.scales if named else "depth",
        scales_mean=False,
        optim=optim,
    )
    return _few_scenes(small) if config.task == "detect" else _few_digits(small)


def _few_digits(config: Config) -> Config:
    data, of_digits = config.data, DataConfig()
    smallest = SMALLEST[models.find(config.model.name).family]
    share = SIDE / data.image_size
    return dataclasses.replace(
        config,
        batch_size=16,
        eval_batch_size=32,
        model=dataclasses.replace(config.model, name=smallest),
        data=dataclasses.replace(
            data,
            source="digits",
            name=of_digits.name,
            data_dir=of_digits.data_dir,
            mean=(0.3,),
            std=(0.37,),
            image_size=SIDE,
            resize=None if data.resize is None else round(data.resize * share),
            crop_padding=data.crop_padding and max(1, round(data.crop_padding * share)),
            train_limit=32,
            eval_limit=40,
            workers=0,
        ),
    )


def _few_scenes(config: Config) -> Config:
    return dataclasses.replace(
        config,
        batch_size=8,
        eval_batch_size=8,
        data=dataclasses.replace(config.data, source="scenes", data_dir="", scenes=(16, 8)),
    )
