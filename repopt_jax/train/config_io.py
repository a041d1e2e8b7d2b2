"""Configs as files: Python files that return one, JSON that keeps one, and what differs between two."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from repopt_jax import userfile
from repopt_jax.train.config import Config


def load_config(file_and_arg: str) -> Config:
    """The config of `path/to/file.py:arg`; a bare name such as `digits:search` means the file shipped with
    the package.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no Python file with a `get_config`.
      TypeError: the file does not return a `Config`.
    """
    name, _, arg = file_and_arg.partition(":")
    path = config_file(name)
    config = userfile.call(path, "get_config", arg, noun="config")
    if not isinstance(config, Config):
        raise TypeError(f"`get_config` of {path} returned {type(config).__name__}, not `Config`")
    return config


def config_file(name: str) -> Path:
    """The file that `name` means: itself where it exists, else a shipped one (with or without `.py`)."""
    folders = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    candidates = [Path(name)]
    if Path(name).parent in (Path("."), Path("configs")):  # another folder is meant as it is written
        candidates += [folder / f"{Path(name).stem}.py" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted({path.stem for folder in folders for path in folder.glob("*.py")})
    raise FileNotFoundError(f"no config file {name!r}; shipped ones are {', '.join(shipped)}")


def to_json(config: Config) -> str:
    """The config as indented JSON; `from_json` gives an equal config back."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """The config that `to_json` wrote.

    Raises:
      ValueError: an unknown field; all of them are listed.
    """
    values = json.loads(text)
    if "fsdp" in values:  # its place until version 0.4
        values["mesh"] = {"fsdp": values.pop("fsdp")}
    unknown: list[str] = []
    config = _from_dict(Config, values, "", unknown)
    if unknown:
        raise ValueError(f"unknown config fields: {', '.join(unknown)}")
    return config


def differing_fields(first: Config, second: Config) -> list[str]:
    """The fields that make two configs different runs, each as `name (1 and 2)`."""
    a, b = _flat(dataclasses.asdict(first)), _flat(dataclasses.asdict(second))
    return [
        f"{name} ({a[name]!r} and {b[name]!r})" for name in a if a[name] != b[name] and name not in _MANNER
    ]


# How a run is carried out, not what it computes: an unfinished run may go on with other values.
_MANNER = (
    *("checkpoint_every", "keep_last", "keep_best", "tensorboard", "data.workers", "data.prefetch"),
    *("mesh.data", "mesh.fsdp", "published"),
)


def _from_dict(cls: Any, values: dict[str, Any], prefix: str, unknown: list[str]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown += [prefix + name for name in values if name not in fields]
    return cls(
        **{
            name: _from_value(fields[name].type, value, f"{prefix}{name}.", unknown)
            for name, value in values.items()
            if name in fields
        }
    )


def _from_value(declared: Any, value: Any, prefix: str, unknown: list[str]) -> Any:
    if dataclasses.is_dataclass(declared):
        return _from_dict(declared, value, prefix, unknown)
    # JSON has no tuples; a config that is read back must equal the one that was written.
    return tuple(value) if isinstance(value, list) else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
