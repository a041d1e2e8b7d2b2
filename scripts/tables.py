"""Writes what is found once and kept in files: the table of networks, its page, the words for completion.

    python scripts/tables.py

It is run after a network, a field of the configs or a shipped config has been added; tests say when.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from repopt_jax import models
from repopt_jax.cli import completion, networks
from repopt_jax.surgery.describe import describe
from repopt_jax.train.config import SOURCES_OF, Config, UnknownRun, load_config, settings_of

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
BEGIN, END = "<!-- table of networks -->\n\n", "\n<!-- end of the table -->"
CONFIGS = Path(__file__).parents[1] / "configs"


def words() -> dict[str, Any]:
    """What `cli.completion` offers: shipped configs with their runs, and the fields with their choices."""
    shipped = {path.stem: runs(path.stem) for path in sorted(CONFIGS.glob("*.py"))}
    fields = {found.name: _values(found) for found in settings_of(Config())}
    return {"configs": shipped, "fields": fields}


def runs(name: str) -> list[str]:
    """The runs of a shipped config."""
    try:
        load_config(f"{name}:?")
    except ValueError as error:
        if isinstance(error.__cause__, UnknownRun):
            return list(error.__cause__.runs)
        raise
    return []


def _values(field: Any) -> list[str] | str | None:
    if field.rules.get("path"):
        return completion.PATHS
    if isinstance(field.default, bool):
        return ["True", "False"]
    choices = field.rules.get("choices")
    if callable(choices):
        found = [choice for task in SOURCES_OF for choice in choices(Config(task=task))]
        return list(dict.fromkeys(found))
    return None if choices is None else list(choices)


def main() -> None:
    completion.FILE.write_text(json.dumps(words(), indent=1) + "\n", encoding="utf-8")
    rows = [dataclasses.asdict(describe(name)) for name in models.list()]
    networks.FILE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    table = networks.markdown(networks.networks())
    found = re.compile(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", re.DOTALL)
    PAGE.write_text(found.sub(lambda _: table, page), encoding="utf-8")


if __name__ == "__main__":
    main()
