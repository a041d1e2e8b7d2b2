"""Writes what is counted once and kept in files: the table of networks, its page, the names for completion.

    python scripts/tables.py

It is run after a network, a field of the configs or a shipped config has been added; tests say when.
"""

import dataclasses
import json
import re
from pathlib import Path

from repopt_jax import models
from repopt_jax.cli import networks
from repopt_jax.surgery.describe import describe

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
BEGIN, END = "<!-- table of networks -->\n\n", "\n<!-- end of the table -->"


def main() -> None:
    rows = [dataclasses.asdict(describe(name)) for name in models.list()]
    networks.FILE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    table = networks.markdown(networks.networks())
    found = re.compile(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", re.DOTALL)
    PAGE.write_text(found.sub(lambda _: table, page), encoding="utf-8")


if __name__ == "__main__":
    main()
