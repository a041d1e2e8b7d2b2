"""The config that a command line names: a file, and typed overrides of its fields."""

import dataclasses
import functools
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from repopt_jax.cli.errors import UsageError
from repopt_jax.hints import did_you_mean


def read_config(file_and_arg: str, overrides: Sequence[str] = ()) -> Any:
    """Reads the config `file_and_arg` and applies `overrides`.

    Args:
      file_and_arg: FILE or FILE:ARG, as `train.load_config` takes it.
      overrides: `--config.a.b=value`, each parsed by the declared type of its field; None is accepted where
        the field may be None. Texts of a tuple stand between commas, or as Python writes them.

    Raises:
      UsageError: unknown fields, or a value that is not of the field's type.
      FileNotFoundError, TypeError: as `train.load_config`.
    """
    from repopt_jax.train import load_config

    return with_overrides(load_config(file_and_arg), overrides)


def with_overrides(config: Any, overrides: Sequence[str]) -> Any:
    """Applies `overrides` to a config, as `read_config` does; the config is changed and returned.

    Raises:
      UsageError: as `read_config`.
    """
    from absl import flags
    from ml_collections import config_flags

    values = dict(override.removeprefix("--config.").split("=", 1) for override in overrides)
    fields = dict(_fields(config))
    if unknown := [name for name in values if name not in fields]:
        raise UsageError(
            f"unknown config field {', '.join(name + did_you_mean(name, fields) for name in unknown)}; "
            f"known are {', '.join(_siblings(unknown[0], list(fields)))}"
        )
    # ml_collections does not support None, which it would parse as a number or a string, nor texts between
    # commas.
    ours: dict[str, Any] = {}
    for name, value in values.items():
        if type(None) in typing.get_args(fields[name]) and value in ("None", "none"):
            ours[name] = None
        elif fields[name] == tuple[str, ...] and not value.startswith(("(", "[", "'", '"')):
            ours[name] = tuple(filter(None, map(str.strip, value.split(","))))
    argv = ["repopt", *(f"--config.{name}={value}" for name, value in values.items() if name not in ours)]
    # A new set of flags, because a second call in this process must not see those of the first.
    flag_values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=flag_values, sys_argv=argv)
        flag_values(argv)
    except flags.Error as error:
        raise UsageError(str(error).replace("flag --", "--")) from error
    config = flag_values["config"].value
    for name, value in ours.items():
        *parts, last = name.split(".")
        setattr(functools.reduce(getattr, parts, config), last, value)
    return config


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name of each field that holds a value, and its type."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def _siblings(name: str, known: Sequence[str]) -> list[str]:
    """Returns the fields of the same section as `name`, or of the top level if there is no such section."""
    part = name.rpartition(".")[0]
    inside = [field for field in known if field.rpartition(".")[0] == part] if part else []
    top = dict.fromkeys(field.partition(".")[0] + (".*" if "." in field else "") for field in known)
    return inside or list(top)
