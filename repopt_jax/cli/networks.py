"""The table of all networks, as text, Markdown and JSON.

It is kept in `models/table.json`, which `scripts/tables.py` writes with `surgery.describe`: to count sixty
networks takes minutes. JAX is not needed to read it.
"""

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repopt_jax.hints import did_you_mean

FILE = Path(__file__).parents[1] / "models" / "table.json"
HEADS = ("network", "trained as", "images", "parameters", "deployed", "MACs", "top-1", "source of top-1")


def networks() -> list[dict[str, Any]]:
    """The fields of `surgery.describe.Description` of every network, in the order of the registry."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def matching(pattern: str) -> list[dict[str, Any]]:
    """Those whose name has `pattern` in it, or is one that a pattern with * or ? describes.

    Raises:
      ValueError: there is none.
    """
    rows, wanted = networks(), pattern.lower()
    if not any(sign in wanted for sign in "*?["):
        wanted = f"*{wanted}*"
    if not (found := [row for row in rows if fnmatch.fnmatchcase(row["name"], wanted)]):
        names = [row["name"] for row in rows]
        raise ValueError(
            f"no network is named like {pattern!r}{did_you_mean(pattern, names)}; `repopt models` lists all"
        )
    return found


def text(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines with aligned columns."""
    cells = [HEADS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]

    def line(row: Sequence[str]) -> str:
        placed = [  # words to the left, numbers to the right
            f"{cell:<{width}}" if column in (0, 1, 7) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        return "  ".join(placed).rstrip()

    return [line(row) for row in cells]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of a page of `docs/`."""
    lines = [HEADS, ("---", "---", *["---:"] * 5, "---")]
    lines += [(f"`{name}`", f"`{mode}`", *rest) for name, mode, *rest in map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    size, top1 = row["image_size"], row["top1"]
    return (
        row["name"],
        row["mode"],
        "" if size is None else f"{size} px",
        f"{row['train_parameters']:,}",
        f"{row['deploy_parameters']:,}",
        "" if row["macs"] is None else _short(row["macs"]),
        "" if top1 is None else f"{100 * top1:.4g}",
        row["source"] or "",
    )


def _short(count: int) -> str:
    """A count with three digits: 11.8 G, 897 k."""
    for size, letter in ((10**9, "G"), (10**6, "M")):
        if count >= size * 0.9995:
            value = count / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {letter}"
    return f"{count / 1000:.3g} k"
