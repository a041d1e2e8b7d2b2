"""Results of measurements, as JSON, as tables in Markdown, and as bars."""

import dataclasses
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import optax

from repopt_jax import jsontext
from repopt_jax._version import __version__
from repopt_jax.report.machine import processor_name

LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Section:
    """One table.

    Attributes:
      part: a key of `suite.PARTS`.
      title: what was measured; unique within a file.
      settings: the settings of the measurement.
      candidates: name -> results.
      rounds: number of measurements of each candidate, or None.
      notes: sentences below the table.
      command: the command that measured it.
      load: load average of the machine just before; None if it is unknown.
    """

    part: str
    title: str
    settings: dict[str, Any]
    candidates: dict[str, dict[str, Any]]
    rounds: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    command: str = ""
    load: float | None = None


def write(out: str | Path, results: dict[str, Any]) -> list[Path]:
    """Writes OUT.json, OUT.md and, if Matplotlib is installed, OUT.png; returns their paths."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_name(f"{out.name}.{ending}") for ending in ("json", "md", "png")]
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    files[1].write_text(markdown(results))
    try:
        from repopt_jax.bench import chart
    except ModuleNotFoundError as error:
        LOG.warning("no chart: %s is not installed", error.name)
        return files[:2]
    chart.draw(sections_of(results)).savefig(files[2], dpi=chart.DPI)
    return files


def read(out: str | Path) -> dict[str, Any] | None:
    """Reads the results in OUT.json; returns None if there is no such file.

    Raises:
      ValueError: it holds something else, or results of another machine or of other versions.
    """
    path = Path(f"{out}.json")
    if not path.exists():
        return None
    try:
        results = jsontext.parse(path.read_bytes(), path)
        there = results["machine"]
        markdown(joined(results, ()))  # what can be joined and shown is ours
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results of `repopt bench`: give another --out") from error
    here = machine()
    if changed := [name for name in here if here[name] != there.get(name)]:
        what = ", ".join(f"{name} {there.get(name)!r}, now {here[name]!r}" for name in changed)
        raise ValueError(f"{path} was measured elsewhere ({what}): give another --out, or remove it")
    return results


def joined(earlier: dict[str, Any] | None, sections: Iterable[Section]) -> dict[str, Any]:
    """Adds `sections` to results; one of the same part and title replaces the earlier one."""
    results = earlier or {"machine": machine(), "sections": []}
    kept = {(s["part"], s["title"]): s for s in results["sections"]}
    kept |= {(s.part, s.title): dataclasses.asdict(s) for s in sections}
    return results | {"sections": list(kept.values())}


def sections_of(results: dict[str, Any]) -> list[Section]:
    return [Section(**section) for section in results["sections"]]


def machine() -> dict[str, Any]:
    """Returns the device and the versions for results."""
    device = jax.local_devices()[0]
    found = {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "repopt_jax": __version__,
    }
    if device.platform != "cpu":
        found["driver"] = " ".join(str(device.client.platform_version).split())
    return found


def load() -> float | None:
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def markdown(results: dict[str, Any]) -> str:
    m, sections = results["machine"], sections_of(results)
    versions = ", ".join(f"{name} {m[name]}" for name in ("jax", "flax", "optax", "repopt_jax"))
    device = "CPU" if m["platform"] == "cpu" else m["device"]
    lines = [
        "# Benchmark",
        "",
        f"{device}; processor {m['processor']}, {m['cores']} cores; Python {m['python']}, {versions}"
        + (f"; {m['driver']}" if "driver" in m else "")
        + ".",
        "",
        "Times are medians over the rounds, with quartiles in brackets. In every round all candidates of a "
        "table ran in turn, each round in another order, and a ratio is the median of the ratios of two "
        "times of the same round.",
        "",
    ]
    for section in sections:
        lines += [f"## {section.title}", "", *_facts_line(section), "", *table(section), ""]
        lines += [line for note in section.notes for line in (note, "")]
    return "\n".join(lines).rstrip() + "\n"


def _facts_line(section: Section) -> list[str]:
    """Returns the line below a table that says how it was measured, if anything is known."""
    facts = [f"`{section.command}`"] if section.command else []
    if section.rounds:
        facts.append(f"{section.rounds} rounds")
    if section.load is not None:
        facts.append(f"load of the machine before it {section.load}")
    if "torch" in section.settings:
        facts.append(f"torch {section.settings['torch']}")
    if section.settings.get("dtype") == "float32" and "tf32" in section.settings:
        facts.append(
            f"TF32 {'allowed' if section.settings['tf32'] else 'not allowed'} where the device has it"
        )
    if "limit_is" in section.settings:
        facts.append(f"limit: {section.settings['limit_is']}")
    return ["; ".join(facts) + "."] if facts else []


def table(section: Section) -> list[str]:
    """Returns a table as lines of Markdown, without columns that are empty for all candidates."""
    used = [
        (heading, cell)
        for heading, cell in COLUMNS
        if any(cell(facts) is not None for facts in section.candidates.values())
    ]
    if not used:
        return [f"{name}: {facts.get('failed', 'nothing')}" for name, facts in section.candidates.items()]
    lines = [
        f"| | {' | '.join(heading for heading, _ in used)} |",
        f"|---|{'---|' * len(used)}",
    ]
    for name, facts in section.candidates.items():
        if "failed" in facts:
            cells = [facts["failed"], *[""] * (len(used) - 1)]
        else:
            cells = [cell(facts) or "" for _, cell in used]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


Cell = Callable[[dict[str, Any]], str | None]


def _spread(key: str, digits: str = ".3g") -> Cell:
    """A column of the median and, if there are any, the quartiles of `facts[key]`."""

    def cell(facts: dict[str, Any]) -> str | None:
        return None if key not in facts else with_quartiles(facts[key], digits)

    return cell


def _ratio(base: str) -> Cell:
    def cell(facts: dict[str, Any]) -> str | None:
        ratio = facts.get("ratios", {}).get(base)
        return None if ratio is None else with_quartiles(ratio, ".3f")

    return cell


def _number(key: str, form: str, unit: float = 1) -> Cell:
    def cell(facts: dict[str, Any]) -> str | None:
        value = facts.get(key)
        return None if value is None else format(value if unit == 1 else value / unit, form)

    return cell


def _own_ratio(facts: dict[str, Any]) -> str | None:
    return _ratio(facts["baseline"])(facts) if "baseline" in facts else None


def with_quartiles(values: dict[str, float], digits: str) -> str:
    middle = short(values["median"], digits)
    if "low" not in values:
        return middle
    return f"{middle} ({short(values['low'], digits)} to {short(values['high'], digits)})"


def short(value: float, digits: str = ".3g") -> str:
    """Formats a number with three digits, but never drops digits before the point: 0.245, 24.5, 2450."""
    return f"{value:.0f}" if digits.endswith("g") and abs(value) >= 100 else format(value, digits)


# Headings and cells of the columns of all parts; a table has those columns for which it has values.
COLUMNS: Sequence[tuple[str, Cell]] = (
    ("compared with", lambda facts: facts.get("baseline")),
    ("ms", _spread("ms")),
    ("ratio", _own_ratio),
    ("ratio to plain SGD", _ratio("plain SGD")),
    ("ratio to plain", _ratio("plain")),
    ("ratio to RepVGG", _ratio("RepVGG")),
    ("ratio to RepOpt, fused", _ratio("RepOpt, fused")),
    ("ratio to RepVGG, fused", _ratio("RepVGG, fused")),
    ("ratio to PyTorch", _ratio("PyTorch")),
    ("ratio to PyTorch SGD, foreach", _ratio("PyTorch SGD, foreach")),
    ("images/s", _number("images_per_s", ",.0f")),
    ("GB/s", _number("bytes_per_s", ",.1f", 1e9)),
    ("share of the copy's bandwidth", _spread("share_of_copy", ".2f")),
    ("images in a batch", _number("batch", ",d")),
    ("times RepVGG's", _number("of_repvgg", ".2f")),
    ("trace and lower, s", _spread("lower_s")),
    ("compile, s", _spread("compile_s")),
    ("together, s", _spread("total_s")),
    ("peak memory, MB", _number("peak_bytes", ",.1f", 1e6)),
    ("of it temporaries, MB", _number("temporary_bytes", ",.1f", 1e6)),
    ("weights, MB", _number("weight_bytes", ",.1f", 1e6)),
    ("state, bytes", _number("state_bytes", ",d")),
    ("more than the plain one's, bytes", _number("extra_state_bytes", ",d")),
    ("largest constant, bytes", _number("largest_constant_bytes", ",d")),
    ("to read and decode an image, ms", _number("decode_ms", ".2f")),
    ("to augment it, ms", _number("augment_ms", ".2f")),
    ("cores that feed it", _number("cores", ".2g")),
)
