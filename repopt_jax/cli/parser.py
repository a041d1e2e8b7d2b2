"""The parser of the command line: argparse's, with the messages and the spelling of options that are ours."""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from repopt_jax.cli import completion
from repopt_jax.cli.errors import UsageError
from repopt_jax.hints import did_you_mean


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError` and knows the names of its options."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.options: list[str] = ["-h", "--help"]
        self.takes_config: bool = False
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **kwargs)

    def option(
        self,
        spelling: str,
        description: str,
        *,
        values: Sequence[str] | completion.Complete | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the option that is spelled `--name=METAVAR`, with the keywords of `add_argument`; `values` are
        what a shell offers for it."""
        name, _, metavar = spelling.partition("=")
        self.options.append(name)
        value = {"metavar": metavar} if metavar else {}  # a switch has none
        action = self.add_argument(name, help=description, **value, **kwargs)
        if metavar:
            completion.values(action, values)

    def argument(
        self,
        metavar: str,
        description: str,
        *,
        values: Sequence[str] | completion.Complete | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds an argument that is known by its place; see `option`."""
        dest = kwargs.pop("dest", metavar.lower())
        action = self.add_argument(dest, metavar=metavar, help=description, **kwargs)
        completion.values(action, values)

    def config_options(self, **kwargs: Any) -> None:
        self.takes_config = True
        self.option(
            "--config=FILE[:ARG]",
            "a Python file with get_config(arg), or the name of a shipped one, such as digits; "
            "--config.FIELD=VALUE sets one of its fields, such as --config.optim.learning_rate=0.05",
            values=completion.configs,
            **kwargs,
        )
        self.printing_option()

    def printing_option(self) -> None:
        self.option(
            "--print-config",
            "prints the config with all of its fields, as a Python file for --config, and runs nothing",
            action="store_true",
        )

    def asked_for_config(self) -> None:
        """Lets options be left out that a config does not need."""
        for action in self._actions:
            action.required = action.required and action.dest in ("config", "run")

    def comparison_options(self) -> None:
        self.option("--results=PATH", "also writes PATH.md, PATH.json and PATH.png", default="")
        self.option("--named=TEXT", "what the report calls the command (as it was typed)", default="")
        self.option(
            "--seeds=N", "trainings in each way (as the config says; else 2, of a detector 1)", type=positive
        )
        self.option(
            "--workers=N",
            "processes that train side by side, each on its share of the cores (on a CPU one for each core, "
            "at most 8); 0 for this process alone (the default elsewhere)",
            type=whole,
        )

    def checkpoint_options(self) -> None:
        self.option(
            "--checkpoint=WHICH",
            "of a run: latest (the default), best, or the number of a step",
            values=("latest", "best"),
        )
        self.option("--data-dir=DIR", "folder of the images, if not the one that the run used")

    def check_options(self, arguments: Sequence[str]) -> None:
        """Raises UsageError for unknown and repeated options.

        argparse would report missing options first, and use the last of repeated ones.
        """
        seen = set()
        for argument in arguments:
            name = argument.partition("=")[0]
            if not name.startswith("--") or (self.takes_config and name.startswith("--config.")):
                continue
            if name not in self.options:
                known = self.options[1:]
                raise UsageError(
                    f"unknown option {name}{did_you_mean(name, known)}; known are {', '.join(known)}"
                )
            if name in seen:
                raise UsageError(f"option {name} is given twice")
            seen.add(name)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


# Types of options, by the names that argparse's messages use.


def path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")
    return value


def whole(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def count(text: str) -> int | None:
    return None if text == "all" else positive(text)
