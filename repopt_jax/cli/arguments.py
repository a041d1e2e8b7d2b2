"""The command line of `repopt`, read: plain flags, a config file, and typed overrides of its fields."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class UsageError(Exception):
    """The command line is wrong."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line: plain flags and positional arguments by name, the value of --config, and the
    overrides as typed."""

    flags: dict[str, str]
    config: str | None
    overrides: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: what it does and its flags (name -> default, None where it must be given).

    `config` is the default of --config; overrides are accepted where `takes_config`. `positional` names the
    arguments that are given without a name, in their order; all of them must be.
    """

    act: Callable[[Arguments], int]
    help: str
    flags: dict[str, str | None]
    config: str | None = None
    takes_config: bool = False
    positional: tuple[str, ...] = ()


def parse(argv: Sequence[str], command: Command) -> Arguments:
    """Sorts the arguments of a subcommand into flags, config and overrides.

    Raises:
      UsageError: an unknown, repeated, missing or empty flag, or too few or too many arguments without a
        name.
    """
    given: dict[str, str] = {}
    places = list(command.positional)
    overrides = []
    known = [*command.flags, *(["config"] if command.takes_config else [])]
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--"):
            if places and argument:
                given[places.pop(0)] = argument
                continue
            raise UsageError(f"unexpected argument {argument!r}: arguments are written --name=value")
        name, equals, value = argument[2:].partition("=")
        is_override = command.takes_config and name.startswith("config.")
        if not is_override and name not in known:
            raise UsageError(f"unknown flag --{name}{closest(name, known)}; known are {_named(known)}")
        if not equals and ((value := next(arguments, "")) == "" or value.startswith("--")):
            raise UsageError(f"flag --{name} has no value: write --{name}=value")
        if is_override:
            overrides.append(f"--{name}={value}")
        elif name in given:
            raise UsageError(f"flag --{name} is given twice")
        else:
            given[name] = value
    defaults = {**command.flags, **({"config": command.config} if command.takes_config else {})}
    missing = [name for name, default in defaults.items() if default is None and not given.get(name)]
    if missing:
        raise UsageError(f"{_named(missing)} must be given; see --help")
    if places:
        raise UsageError(f"{' and '.join(map(str.upper, places))} must be given; see --help")
    flags = {name: given.get(name, default or "") for name, default in command.flags.items()}
    flags |= {name: given[name] for name in command.positional}
    return Arguments(flags, given.get("config", command.config), tuple(overrides))


def read_config(arguments: Arguments) -> Any:
    """The config that the command line names, with its overrides, each parsed by the type of its field.

    Raises:
      UsageError: an unknown field, or a value that is not of the field's type.
      FileNotFoundError, TypeError: as `train.load_config`.
    """
    from absl import flags
    from ml_collections import config_flags

    from repopt_jax.train import load_config

    config = load_config(arguments.config or "")
    names = [override[len("--config.") :].partition("=")[0] for override in arguments.overrides]
    known = list(_fields(config))
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"unknown config field {', '.join(name + closest(name, known) for name in unknown)}; "
            f"known are {', '.join(_neighbours(unknown[0], known))}"
        )
    # Flags of their own: the process's are absl's business, and a second call must not find the first one's.
    values = flags.FlagValues()
    nothing, something = _split_none(config, arguments.overrides)
    argv = ["repopt", *something]
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except flags.Error as error:
        raise UsageError(str(error).replace("flag --", "--")) from error
    config = values["config"].value
    for name in nothing:
        *parts, last = name.split(".")
        setattr(functools.reduce(getattr, parts, config), last, None)
    return config


def _split_none(config: Any, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The fields that are overridden with None, and the other overrides as typed.

    ml_collections reads "None" as a number or a text, also where the field may be None.
    """
    optional = set(_optional_fields(config))
    nothing, something = [], []
    for override in overrides:
        name, _, value = override[len("--config.") :].partition("=")
        if name in optional and value in ("None", "none"):
            nothing.append(name)
        else:
            something.append(override)
    return nothing, something


def _optional_fields(config: Any, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _optional_fields(value, f"{prefix}{field.name}.")
        elif type(None) in typing.get_args(hints[field.name]):
            yield prefix + field.name


def _fields(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _neighbours(name: str, known: Sequence[str]) -> list[str]:
    """The fields of the same part of the config, or those of its top where there is no such part."""
    part = name.rpartition(".")[0]
    inside = [field for field in known if field.rpartition(".")[0] == part] if part else []
    top = dict.fromkeys(field.partition(".")[0] + (".*" if "." in field else "") for field in known)
    return inside or list(top)


def whole_number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UsageError(f"--{name}={value} must be a whole number") from error


def number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"--{name}={value} must be a number") from error


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def closest(name: str, known: Any) -> str:
    """A hint: the known name that is most alike or ends alike (`learning_rat`: `optim.learning_rate`)."""
    last = {field.rpartition(".")[2]: field for field in known}
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    near = near or [last[n] for n in difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1)]
    return f" (did you mean {near[0]}?)" if near else ""
