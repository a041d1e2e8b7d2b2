"""Completion by the shell: commands, options, their values, configs with their runs and fields, networks.

`repopt completion bash` prints a script of argcomplete's. At each press of the tabulator key it starts
`repopt` with the line so far in the environment, and `answer` writes what can follow. That must not take
longer than a person waits, so JAX is not imported: what would need it is kept in `completions.json`, which
`scripts/tables.py` writes.
"""

import json
import os
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from repopt_jax.cli.networks import networks

SHELLS = ("bash", "zsh", "fish")
FILE = Path(__file__).with_name("completions.json")
PATHS = "path"  # in the file, of a field that holds one

Complete = Callable[[str], Iterable[str]]  # the start of a word -> words, of which those that begin so count


def asked() -> bool:
    """Whether this process was started to complete a line."""
    return "_ARGCOMPLETE" in os.environ


def answer(program: ArgumentParser) -> None:
    """Writes what can follow in the line that the shell has given, and ends the process."""
    from argcomplete.finders import CompletionFinder

    class Finder(CompletionFinder):
        def collect_completions(
            self, active_parsers: list[ArgumentParser], parsed_args: Namespace, cword_prefix: str
        ) -> list[str]:
            parser = active_parsers[-1]
            if getattr(parser, "takes_config", False) and cword_prefix.startswith("--config."):
                return self._described(fields(cword_prefix))
            found = super().collect_completions(active_parsers, parsed_args, cword_prefix)
            options = {name: action for action in parser._actions for name in action.option_strings}
            with_value = [name for name, action in options.items() if action.nargs not in (0, "?")]
            for name in with_value:
                self._display_completions[f"{name}="] = self._display_completions.get(name, "")
            return self._described(f"{name}=" if name in with_value else name for name in found)

        def _described(self, found: Iterable[str]) -> list[str]:
            """Gives all of them a description, which zsh and fish show."""
            found = list(found)
            for word in found:
                self._display_completions.setdefault(word, "")
            return found

    *words, _ = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0"))].split(" ")
    given = [word.partition("=")[0] for word in words]
    given += [f"{name}=" for name in given]
    # The options that are left, also where nothing of one is typed yet, but not the short ones.
    otherwise: Any = _Values(_nothing)
    Finder()(program, always_complete_options="long", exclude=given, default_completer=otherwise)


def script(shell: str) -> str:
    """The script that switches completion on in a shell of `SHELLS`.

    Raises:
      ModuleNotFoundError: argcomplete is not installed.
    """
    from argcomplete.shell_integration import shellcode

    return shellcode(["repopt"], use_defaults=False, shell=shell)


# -- what an option can have as its value


def values(action: Action, given: Sequence[str] | Complete | None) -> None:
    """Sets what completes the value of an option or argument: `given`, or what its metavar says."""
    metavar = str(action.metavar)
    by_metavar = {"DIR": folders, **dict.fromkeys(("FILE", "FILE.py", "PATH", "IMAGE", "IN", "OUT"), paths)}
    complete: Complete = by_metavar.get(metavar, _nothing)
    if callable(given):
        complete = given
    elif given is not None:
        words = tuple(given)
        complete = lambda prefix: words  # noqa: E731
    if metavar.endswith((",...", "PARTS")):  # several with commas between them
        complete = _several(complete)
    action.completer = _Values(complete)  # pyright: ignore[reportAttributeAccessIssue]


class _Values:
    """What argcomplete calls."""

    def __init__(self, complete: Complete):
        self.complete = complete

    def __call__(self, *, prefix: str, **_: Any) -> list[str]:
        return list(self.complete(prefix))


def _several(complete: Complete) -> Complete:
    def after_the_last_comma(prefix: str) -> list[str]:
        before, comma, last = prefix.rpartition(",")
        used = before.split(",")
        return [f"{before}{comma}{word}" for word in complete(last) if word not in used]

    return after_the_last_comma


def _nothing(prefix: str) -> tuple[str, ...]:
    return ()


def paths(prefix: str, *, only_folders: bool = False) -> Iterator[str]:
    """The files and folders that begin with `prefix`; hidden ones if it names them so."""
    folder, start = os.path.split(prefix)
    try:
        entries = sorted(os.scandir(Path(folder or ".").expanduser()), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
            if entry.is_dir():
                yield f"{os.path.join(folder, entry.name)}/"
            elif not only_folders:
                yield os.path.join(folder, entry.name)


def folders(prefix: str) -> Iterator[str]:
    return paths(prefix, only_folders=True)


def names_of_networks(prefix: str) -> list[str]:
    return [row["name"] for row in networks()]


def names_of_classifiers(prefix: str) -> list[str]:
    return [row["name"] for row in networks() if row["task"] == "classify"]


def configs(prefix: str) -> list[str]:
    """The names of shipped configs and paths; after `digits:` the runs of that config."""
    shipped = _kept()["configs"]
    name, colon, _ = prefix.partition(":")
    if colon:
        return [f"{name}:{run}" for run in shipped.get(Path(name).stem, ())]
    return [*shipped, *paths(prefix)]


def fields(word: str) -> Iterator[str]:
    """What begins with `word`, `--config.` and more: sections and fields, or after a = the values of one."""
    kept = _kept()["fields"]
    name, is_set, value = word.removeprefix("--config.").partition("=")
    if is_set:
        known = kept.get(name)
        found = paths(value) if known == PATHS else known or ()
        yield from (f"--config.{name}={one}" for one in found if one.startswith(value))
        return
    begun = [field for field in kept if field.startswith(name)]
    sections = dict.fromkeys(_section(field, name) for field in begun)
    # A single section is opened: what is in it is of more use.
    yield from (
        f"--config.{found}" for found in ([f"{f}=" for f in begun] if len(sections) == 1 else sections)
    )


def _section(field: str, typed: str) -> str:
    """`optim.` of the field `optim.learning_rate`, until `optim.` itself is typed; then `field=`."""
    section, dot, _ = field.partition(".")
    return f"{section}{dot}" if dot and "." not in typed else f"{field}="


def _kept() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))
