"""Whether a config can run: the rules at its fields, and those of several fields together."""

import dataclasses
import itertools
import math
import numbers
import operator
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from repopt_jax import extras, models
from repopt_jax.arguments import is_finite, is_of, must_be
from repopt_jax.core.published import STRUCTURES
from repopt_jax.data import SOURCES
from repopt_jax.data.scenes import MIN_SIZE
from repopt_jax.hints import did_you_mean
from repopt_jax.quantize.layers import MIN_BITS
from repopt_jax.surgery.choose import find_structure, parse_options
from repopt_jax.surgery.prepare import Mode
from repopt_jax.train.config import (
    LAW,
    NAMED_SCALES,
    SEARCH,
    TRANSFER,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Setting,
    check_config,
    law_of,
    logger_names,
    needs_no_folder,
    scales_folder,
    settings_of,
    tuples,
)
from repopt_jax.train.own import register_own

MOUNTED = "give a folder; a bucket can be one, mounted (gcsfuse, s3fs)"


def validate(config: Config, *, device_count: int | None = None) -> None:
    """Checks everything that can be checked before data are read.

    Args:
      config: the run.
      device_count: devices that a batch is divided over; all of this job's when not given.

    Raises:
      ValueError: listing every problem, not only the first.
      FileNotFoundError, ModuleNotFoundError: the file of a network of the user's own (`own.register_own`).
    """
    check_config(config)
    if problems := problems_of(config, device_count=device_count):
        raise ValueError("this config cannot run: " + "; ".join(problems))


def problems_of(config: Config, *, device_count: int | None = None) -> list[str]:
    """What `validate` finds wrong, a sentence each, and nothing if the config can run.

    Raises:
      FileNotFoundError, ModuleNotFoundError: as `validate`.
    """
    register_own(config)
    problems = [*_section_problems(config)] or [*_field_problems(config)]
    if any(isinstance(problem, _WrongType) for problem in problems):
        return problems  # values of other types would make no sense, or an error, in the comparisons below
    devices = jax.device_count() if device_count is None else device_count
    others = [
        *_path_problems(config),
        *_scales_problems(config),
        *_structure_problems(config.model),
        *_data_problems(config.data),
        *_schedule_problems(config.optim),
        *_prune_problems(config),
        *_quantize_problems(config),
        *_device_problems(config, devices),
    ]
    model = config.model
    if model.post_se and model.name in models.list() and models.find(model.name).family is not models.vgg:
        others.append(
            f"`model.post_se`=True does nothing with `model.name`={model.name!r}: leave it at False"
        )
    if model.name in models.list():
        side = getattr(models.find(model.name).variant, "image_size", 1)
        if config.data.image_size % side:
            others.append(
                f"`data.image_size`={config.data.image_size} gives maps that are not whole tiles of "
                f"`model.name`={model.name!r}: it must be a multiple of {side}"
            )
    for name in logger_names(config):
        for package in extras.PACKAGES.get(name, ()):
            if not extras.installed(package):
                field = f"`loggers`={config.loggers!r}" if name in config.loggers else f"`{name}`=True"
                others.append(f"{field} needs {package}: install `repopt_jax[{name}]`, or leave {name} out")
    # What has been said of a NaN is enough.
    unusable = tuple(f"`{setting.name}`=" for setting in settings_of(config) if not is_finite(setting.value))
    return problems + [problem for problem in others if not problem.startswith(unusable)]


def check_fields(config: Config) -> None:
    """Checks the rules that stand at the fields, of a config that ran or is to run anywhere.

    Raises:
      FileNotFoundError, ModuleNotFoundError: as `validate`.
      ValueError: listing every problem.
    """
    register_own(config)
    if problems := [*_section_problems(config)] or [*_field_problems(config)]:
        raise ValueError("; ".join(problems))


def _field_problems(config: Config) -> Iterator[str]:
    """What the rules of each field say of its value."""
    settings = {setting.name: setting for setting in settings_of(config)}

    def choices(setting: Setting) -> Any:
        known = setting.rules.get("choices")
        return known(config) if callable(known) else known

    for setting in settings.values():
        name, value, default, rules, _ = setting
        limits, inside = _limits(setting, settings)
        kind = must_be(setting.type, length=setting.rules.get("length"))
        must = ", ".join(filter(None, (kind, limits, "or None" if default is None else "")))
        if not is_of(value, setting.type):
            yield _WrongType(f"`{name}`={value!r} must {must}")
            continue
        known = choices(setting)
        for one in value if isinstance(value, tuple) else (value,):
            if known and one not in known:  # there are none where the field that they hang on is wrong
                yield f"`{name}`={one!r} must be one of {', '.join(known)}{did_you_mean(one, known)}"
        if value is not None and not inside:
            yield f"`{name}`={value} must {must}"
        if not is_finite(value):
            continue
        for where, allowed in rules["only"].items():
            # A wrong value of the other field is a problem of its own.
            other = settings[where]
            if value != default and other.value not in allowed and other.value in (choices(other) or ()):
                yield (
                    f"`{name}`={value!r} does nothing with `{where}`={other.value!r}, only with "
                    f"{' or '.join(map(repr, allowed))}: leave it at {default!r}"
                )
                break


class _WrongType(str):
    """A problem of a value that is not of its field's type."""


def _section_problems(config: Config) -> Iterator[str]:
    """Sections that are none."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(field.type) and not isinstance(value, field.type):  # pyright: ignore[reportArgumentType]
            yield _WrongType(f"`{field.name}` is {value!r}: it must be a {field.type.__name__}")  # pyright: ignore[reportAttributeAccessIssue]


_BOUNDS = {
    "at_least": operator.ge,
    "more_than": operator.gt,
    "at_most": operator.le,
    "less_than": operator.lt,
}


def _limits(setting: Setting, settings: Mapping[str, Setting]) -> tuple[str, bool]:
    """The bounds of a field in words, and whether its value, each entry of it, is finite and inside them; of
    a tuple also its order, and whether it has as many entries as it must."""
    entries = setting.value if isinstance(setting.value, tuple) else (setting.value,)
    words, inside = [], is_finite(setting.value)
    for rule, holds in _BOUNDS.items():
        limit, source = setting.rules.get(rule), ""
        if isinstance(limit, str):
            limit, source = settings[limit].value, f" (`{limit}`)"
        # A limit that is no finite number is a problem of the field that it comes from.
        if isinstance(limit, numbers.Real) and math.isfinite(limit):
            words.append(f"{rule.replace('_', ' ')} {limit}{source}")
            inside = inside and all(isinstance(e, numbers.Real) and holds(e, limit) for e in entries)
    inside = inside and len(entries) == setting.rules.get("length", len(entries))
    order = ""
    if setting.rules.get("ascending"):
        order = "in ascending order"
        inside = inside and all(low <= high for low, high in itertools.pairwise(entries))
    return ", ".join(filter(None, (" and ".join(words), order))), inside


def _path_problems(config: Config) -> Iterator[str]:
    for setting in settings_of(config):
        if setting.rules.get("path") and "://" in (setting.value or ""):
            yield f"`{setting.name}`={setting.value!r} is a URL: {MOUNTED}"


def _scales_problems(config: Config) -> Iterator[str]:
    scales, mode = config.scales, config.model.mode
    if config.scales_mean and (not scales or needs_no_folder(scales)):
        yield (
            f"`scales_mean` with `scales`={scales!r}, which are the same in all channels: give the directory "
            "of searched ones"
        )
    if scales and mode in tuple(Mode) and not Mode(mode).has_scales:
        yield (
            f"`scales`={scales!r} with `model.mode`={mode!r}, which takes none: leave it empty, or train "
            "with them in mode 'repopt'"
        )
    if not scales and mode == Mode.REPOPT:
        yield "`model.mode`='repopt' needs `scales`: 'depth', 'ones', or the directory that a search wrote"
    if scales.startswith(LAW) and law_of(scales) is None:
        yield (
            f"`scales`={scales!r} must have a finite number, at least 0, after {LAW!r}: weight decay * sum "
            "of the learning rates / (1 - momentum) of a search, such as 'law:1.0'"
        )
    if needs_no_folder(scales):
        return
    folder = scales_folder(scales)
    if scales and "://" not in folder and not os.path.isdir(folder):
        what = f"is neither {' nor '.join(NAMED_SCALES)} nor {LAW}NUMBER nor a directory"
        if scales.startswith(TRANSFER):
            what = f"names no directory after {TRANSFER!r}"
        if scales.startswith(SEARCH):
            what = "is for the ways of a comparison (`repopt compare`), not for a run by itself"
        yield (
            f"`scales`={scales!r} {what}: run the search first, or give the directory that it wrote (that of "
            f"another network as '{TRANSFER}DIRECTORY')"
        )


def _structure_problems(model: ModelConfig) -> Iterator[str]:
    try:
        options = parse_options(model.structure_options)
        if model.mode in STRUCTURES:
            find_structure(model.mode, options)
    except ValueError as error:
        yield f"`model.structure_options`={model.structure_options!r}: {error}"


def _data_problems(data: DataConfig) -> Iterator[str]:
    for name in SOURCES[data.source].required if data.source in SOURCES else ():
        if not getattr(data, name):
            yield f"`data.{name}` is empty: `data.source`={data.source!r} needs it"
    if data.source == "scenes" and data.image_size < MIN_SIZE:
        yield f"`data.image_size`={data.image_size} must be at least {MIN_SIZE} for scenes"
    paired = data.flip_pairs or ()
    if len(paired) % 2 or len(set(paired)) < len(paired):
        yield (
            f"`data.flip_pairs`={paired} must be pairs of different keypoints, one after another: 0, 1, 2, 3 "
            "means that 0 and 1 trade places, and 2 and 3"
        )


def _schedule_problems(optim: OptimConfig) -> Iterator[str]:
    if optim.schedule_by == "epoch" and optim.warmup_epochs and not optim.warmup_start:
        yield (
            "`optim.warmup_start`=0 with `optim.schedule_by`='epoch' is an epoch at rate 0: give a small "
            "rate, such as 1e-4"
        )
    if optim.warmup_start and not optim.warmup_epochs:
        yield (
            f"`optim.warmup_start`={optim.warmup_start} does nothing without `optim.warmup_epochs`: leave it "
            "at 0"
        )


def _prune_problems(config: Config) -> Iterator[str]:
    prune = config.prune
    if not prune.run:
        for field in dataclasses.fields(prune):
            if (value := getattr(prune, field.name)) != field.default:
                yield (
                    f"`prune.{field.name}`={value!r} does nothing without `prune.run`: leave it at "
                    f"{field.default!r}, or use `repopt prune`"
                )
        return
    if config.model.mode != Mode.PLAIN:
        yield (
            f"`model.mode`={config.model.mode!r} with `prune.run`: compactors are for plain networks, mode "
            "'plain'"
        )
    if prune.before_epochs >= config.epochs:
        yield (
            f"`prune.before_epochs`={prune.before_epochs:g} leaves none of the {config.epochs} `epochs` for "
            "pruning: lower it, or train longer"
        )
    if jax.process_count() > 1:
        yield f"`prune.run`={prune.run!r} in {jax.process_count()} processes: pruning runs in one"


def _quantize_problems(config: Config) -> Iterator[str]:
    quantize, mode = config.quantize, config.model.mode
    if not quantize.bits:
        for field in dataclasses.fields(quantize):
            if tuples(value := getattr(quantize, field.name)) != field.default:
                yield (
                    f"`quantize.{field.name}`={value!r} does nothing without `quantize.bits`: leave it at "
                    f"{field.default!r}"
                )
        return
    if quantize.bits < MIN_BITS:
        yield f"`quantize.bits`={quantize.bits} must be at least {MIN_BITS}, or 0 for floating point"
    if not quantize.fused and mode not in (Mode.PLAIN, Mode.REPOPT):
        yield (
            f"`model.mode`={mode!r} with `quantize.bits`: layers of branches cannot be quantized; train a "
            "plain network (mode 'plain' or 'repopt'), or a trained one fused (`quantize.fused`=True)"
        )
    if not quantize.fused and quantize.per == "tensor":
        yield (
            "`quantize.per`='tensor' with batch norms: one scale for a kernel does not commute with their "
            "factors; use 'channel', or a trained network fused (`quantize.fused`=True)"
        )
    if not quantize.fused and quantize.scale_bits is not None:
        yield (
            f"`quantize.scale_bits`={quantize.scale_bits} with batch norms: rounded scales do not commute "
            "with their factors; leave it out, or use a trained network fused (`quantize.fused`=True)"
        )
    if quantize.fused and not quantize.run:
        yield "`quantize.fused`=True needs `quantize.run`: a fused network without training learns badly"
    if quantize.fused and (mode in (Mode.SEARCH, Mode.REPOPT) or config.scales):
        yield (
            f"`model.mode`={mode!r} and `scales`={config.scales!r} with `quantize.fused`: scales belong to "
            "the network before it is fused; leave them out, or keep its batch norms"
        )
    if quantize.step is not None and not quantize.run:
        yield f"`quantize.step`={quantize.step} does nothing without `quantize.run`: leave it out"
    if config.prune.run:
        yield "`quantize.bits` with `prune.run`: prune first, and quantize the deployed network"
    if config.optim.custom_l2:
        yield "`optim.custom_l2` with `quantize.bits`: it is for layers of branches; leave it out"


def _device_problems(config: Config, devices: int) -> Iterator[str]:
    accumulate = max(config.optim.accumulate, 1)
    sharers = f"the {devices} devices"
    parts = f"{sharers}, in {accumulate} parts (`optim.accumulate`)," if accumulate > 1 else sharers
    divisors = {
        "batch_size": {f"{parts} that share it": devices * accumulate, **_mixed(config)},
        "eval_batch_size": {f"{sharers} that share it": devices},
    }
    for name, needs in divisors.items():
        size, step = getattr(config, name), math.lcm(*needs.values())
        if size > 0 and (unmet := [what for what, count in needs.items() if size % count]):
            below = size // step * step
            nearest = " and ".join(str(number) for number in (below, below + step) if number > 0)
            yield (
                f"`{name}`={size} is not divisible by {' nor by '.join(unmet)}; the nearest sizes that are: "
                f"{nearest}"
            )
    if config.mesh.fsdp >= 1 and (config.mesh.data is None or config.mesh.data >= 1):
        yield from mesh_problems(config.mesh.data, config.mesh.fsdp, devices)


def _mixed(config: Config) -> dict[str, int]:
    """What mixing in pairs asks of `batch_size`: why, and the number that must divide it."""
    names = [f"`data.{name}`" for name in ("mixup", "cutmix") if getattr(config.data, name) > 0]
    if config.task != "classify" or not names:
        return {}
    number = 2 * jax.process_count()
    within = f" in each of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return {f"{number}, as images are mixed in pairs{within} ({' and '.join(names)})": number}


def mesh_problems(data: int | None, fsdp: int, devices: int) -> list[str]:
    """Why a mesh does not fit `devices` devices; nothing if it does."""
    if fsdp < 1 or (data is not None and data < 1):
        return [f"`mesh.data`={data} and `mesh.fsdp`={fsdp} must be at least 1"]
    if data is None and devices % fsdp:
        return [f"`mesh.fsdp`={fsdp} does not divide the {devices} devices"]
    if data is not None and data * fsdp != devices:
        return [
            f"`mesh.data`={data} times `mesh.fsdp`={fsdp} is {data * fsdp}, but there are {devices} devices: "
            "leave `mesh.data` out (None) for as many as there are"
        ]
    return []
