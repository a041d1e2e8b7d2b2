"""The results file of a comparison: what it holds, what it says, its tables as text.

Its content is that of report.json without folders: `made` (command, commit, machine), a row for each way,
the differences of ways with their intervals, and the sentences that these allow.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repopt_jax import jsontext
from repopt_jax.arguments import is_finite, is_of
from repopt_jax.report import figures, page
from repopt_jax.report.statistics import Difference, standard_error
from repopt_jax.surgery.prepare import Mode
from repopt_jax.train.config import Config, settings_of
from repopt_jax.train.tasks import METRICS, metric_label


def write_results(content: Mapping[str, Any], path: str | Path) -> None:
    """Writes PATH.json, PATH.md and PATH.png: the numbers, the tables, every seed as a point.

    Raises:
      OSError: they cannot be written.
    """
    path, metric = Path(path), METRICS[content["task"]][0]
    tests = {row["label"]: list(row["test"].get(metric.name, {}).values()) for row in content["rows"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = figures.png(figures.spread(tests, figures.styles(tests), metric.label))
    Path(f"{path}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Path(f"{path}.md").write_text(markdown(content), encoding="utf-8")
    Path(f"{path}.png").write_bytes(picture)


def read_results(path: str | Path) -> dict[str, Any]:
    """What a results file, PATH.json of `--results=PATH`, holds.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no results file of a comparison; it lists all that is wrong.
    """
    path = Path(path)
    content = jsontext.parse(path.read_bytes(), path)
    if problems := list(itertools.islice(_faults(content), 5)):
        raise ValueError(
            f"{path} is not the results of a comparison: {'; '.join(problems)}. Give the .json that `repopt "
            "compare --results` wrote"
        )
    return content


# Name -> type of what is read from results, and from one of their rows.
TYPES = {
    "title": str,
    "task": str,
    "metric": str,
    "points": list,
    "validation": int,
    "about": list,
    "made": dict,
    "rows": list,
    "differences": list,
    "tuned_by": int,
}
TYPES_OF_A_ROW = {
    "way": str,
    "label": str,
    "point": str,
    "tuning": list,
    "test": dict,
    "test_count": int,
    "step_ms": (float, int, type(None)),
    "train_parameters": (int, type(None)),
}
TYPES_OF_MADE = {"command": str, "date": str, "commit": str, "processor": str, "versions": dict}
# What files of today have besides.
LATER = {"ways": list, "pairs": list, "parts": list}
LATER_OF_A_ROW = {"settings": dict, "seeds": list, "epochs": (int, type(None)), "steps": (int, type(None))}


def _faults(content: Any) -> Iterator[str]:
    """What makes a value no content of a results file, as far as `join` reads it."""
    if faults := list(_wrong("it", content, TYPES, LATER)):
        yield from faults
        return
    if content["task"] not in METRICS:
        yield f"`task` is {content['task']!r}, not one of {', '.join(METRICS)}"
    yield from _wrong("`made`", content["made"], TYPES_OF_MADE)
    if not content["rows"]:
        yield "`rows` is empty"
    for number, row in enumerate(content["rows"]):
        where = f"row {number}"
        faults = list(_wrong(where, row, TYPES_OF_A_ROW, {**LATER_OF_A_ROW, "tuned_by": int}))
        yield from faults
        if faults:
            continue
        for metric, values in row["test"].items():
            if not isinstance(values, dict) or not all(map(_is_whole, values)):
                yield f"`test` of {where} has no seeds of {metric}"
            elif not all(map(_is_number, values.values())):
                yield f"`test` of {where} has something that is no number"
        if not all(value is None or _is_number(value) for value in row["tuning"]):
            yield f"`tuning` of {where} has something that is no number"
        if not all(isinstance(seed, int) for seed in row.get("seeds", ())):
            yield f"`seeds` of {where} has something that is no whole number"
    for number, d in enumerate(content["differences"]):
        yield from _wrong(f"difference {number}", d, {"way": str, "than": str})
    for number, pair in enumerate(content.get("pairs", ())):
        if not (isinstance(pair, list) and list(map(type, pair)) == [str, str]):
            yield f"pair {number} is not two names"
    for number, part in enumerate(content.get("parts", ())):
        where = f"part {number}"
        yield from _wrong(where, part, {**TYPES_OF_MADE, "ways": dict})
        for label, way in part.get("ways", {}).items() if isinstance(part, dict) else ():
            wanted = {"seeds": list, "step_ms": (float, int, type(None))}
            yield from _wrong(f"{label!r} of {where}", way, wanted)


def _wrong(
    where: str, found: Any, wanted: Mapping[str, Any], later: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Which fields are missing or of another type; those of `later` may be missing."""
    if not isinstance(found, dict):
        yield f"{where} is no object"
        return
    if missing := sorted(wanted.keys() - found.keys()):
        yield f"{where} has no {', '.join(missing)}"
    for name, kind in {**wanted, **(later or {})}.items():
        if name in found and not isinstance(found[name], kind):
            yield f"`{name}` of {where} is {_short(found[name])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:37]}..."


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _is_number(value: Any) -> bool:
    return is_of(value, float) and is_finite(value)


# -- what rows and differences hold


def difference_row(d: Difference, label: Callable[[str], str]) -> dict[str, Any]:
    """A difference as report.json has it; `label` gives what a way is called."""
    return {
        "label": f"{label(d.way)} minus {label(d.than)}",
        **dataclasses.asdict(d),
        "shown": d.shown,
        "equal": d.equal,
    }


def spread(test: Mapping[str, Mapping[Any, float]], metric: str, count: int) -> dict[str, float | None]:
    """Mean and deviation of the seeds, and the binomial error of an accuracy on so many images.

    Args:
      test: metric -> seed -> value in [0, 1].
      metric: whose mean and deviation.
      count: number of test images; 0 if every run diverged, so that nothing was tested.
    """
    values, accuracies = list(test.get(metric, {}).values()), test.get("accuracy")
    error = standard_error(statistics.fmean(accuracies.values()), count) if accuracies and count else None
    return {
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "standard_error": error,
    }


# -- what the differences say


def sentences(
    differences: Sequence[Difference], labels: Mapping[str, str], starts: Mapping[str, str]
) -> Iterator[str]:
    """`conclusions` of differences alone.

    Args:
      differences: way minus way.
      labels: way -> what it is called.
      starts: way -> the way that is its rule of initialization alone.
    """
    for than in dict.fromkeys(d.than for d in differences):
        for word, sign in (("Ahead of", 1), ("Behind", -1)):
            found = [d for d in differences if d.than == than and d.shown and d.mean * sign > 0]
            if found:
                listed = "; ".join(f"{labels[d.way]} {_with_interval(d)}" for d in found)
                yield f"{word} {labels[than]} by points that are unlikely to be chance: {listed}."
    if equal := [d for d in differences if d.equal]:
        listed = "; ".join(f"{labels[d.way]} minus {labels[d.than]} {_points(d.mean)}" for d in equal)
        yield f"The same in each seed, so that there is no spread to judge by: {listed}."
    if unclear := [d for d in differences if not d.shown and not d.equal and d.low is not None]:
        listed = "; ".join(f"{labels[d.way]} minus {labels[d.than]} {_with_interval(d)}" for d in unclear)
        yield f"Not shown which is better, as the interval contains zero: {listed}."
    if single := [d for d in differences if d.low is None]:
        listed = "; ".join(f"{labels[d.way]} minus {labels[d.than]} {_points(d.mean)}" for d in single)
        yield f"One seed says nothing of the spread: {listed}."
    yield from _share_of_start(differences, labels, starts)


def _with_interval(d: Difference) -> str:
    assert d.low is not None
    assert d.high is not None
    return f"{_points(d.mean)} ({_points(d.low)} to {_points(d.high)})"


def _share_of_start(
    differences: Sequence[Difference], labels: Mapping[str, str], starts: Mapping[str, str]
) -> Iterator[str]:
    """How much of a lead that is shown is there with the rule of initialization alone."""
    found = {(d.way, d.than): d for d in differences}
    for (way, than), whole in found.items():
        start = starts.get(way)
        if start is None or (start, than) not in found or not whole.shown or whole.mean <= 0:
            continue
        part, rest = found[start, than].mean, found.get((way, start))
        lead = f"{labels[way]} is ahead of {labels[than]}"
        more = "" if rest is None or rest.shown else ", and more than that is not shown"
        if part >= whole.mean:
            yield (
                f"All of the lead is where the training starts: {lead} by {_points(whole.mean)} points, and "
                f"the initialization alone is by {_points(part)}."
            )
        elif part >= whole.mean / 2:
            yield (
                f"Most of the lead is where the training starts: of the {_points(whole.mean)} points that "
                f"{lead}, {_points(part)} are there with the initialization alone{more}."
            )
        elif part > 0:
            yield (
                f"The initialization alone gives {_points(part)} of the {_points(whole.mean)} points that "
                f"{lead}."
            )
        else:
            yield f"The initialization alone gives none of the {_points(whole.mean)} points that {lead}."


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


# Fields that have no meaning where scales do not multiply gradients.
OF_MULTIPLIERS = tuple(
    name
    for name, *_, rules, _ in settings_of(Config())
    if "init" not in rules["only"].get("rules", ("init",))
)


def starts_of(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Way -> the way that is its rule of initialization alone, where there is one; `settings` are those of
    each way as `Comparison.settings` gives them."""
    rules, kept = {}, {}
    for way, of in settings.items():
        if of.get("model.mode") == Mode.REPOPT and "scales" in of:
            rules[way] = of.get("rules", Config.rules)
            kept[way] = {name: v for name, v in of.items() if name not in ("rules", *OF_MULTIPLIERS)}
    return {
        way: other
        for way, other in itertools.permutations(kept, 2)
        if (rules[way], rules[other]) == ("both", "init") and kept[way] == kept[other]
    }


# -- as text


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of report.json's content, or of what `join` made of several, as Markdown."""
    made, parts = content["made"], content.get("parts", ())
    rows = content["rows"]
    metrics = [m for m in METRICS[content["task"]] if any(m.name in row["test"] for row in rows)]
    lines = [f"# {content['title']}", ""]
    if made["command"]:
        lines += [f"`{made['command']}`", ""]
    size = _size(rows)
    if parts:
        lines += [f"{size} Made in {len(parts)} parts:", ""]
        lines += [
            f"{i}. {_origin(part)}" + (f" `{part['command']}`" if part["command"] else "")
            for i, part in enumerate(parts, 1)
        ]
        lines += [""]
    else:
        lines += [f"{_origin(made)} {size}", ""]
    if len(content["points"]) > 1:
        lines += [
            f"Each way was trained at every point of the grid by {_tuned_by(content)}; "
            f"{content['validation']} training images that were held out decided between the points"
            f"{', in each part for itself' if parts else ''}, and the test images were read when all was "
            "trained.",
            "",
        ]
    for metric in metrics:
        lines += [*_ways_table(rows, metric.name, metric.label), ""]
    if parts:
        lines += [*_parts_table(rows, parts), ""]
    if len(content["points"]) > 1:
        lines += [*_tuning_table(content), ""]
    if content["differences"]:
        lines += [*_difference_table(content), "", *(f"- {s}" for s in content["conclusions"]), ""]
    if content["deployed"]:
        lines += ["| | largest difference of an output | parameters deployed |", "|---|---|---|"]
        lines += [
            f"| {name} | {d['max_abs']:.1e} | {d['deploy_parameters']:,} |"
            for name, d in content["deployed"].items()
        ]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _tuned_by(content: Mapping[str, Any]) -> str:
    counts = {row.get("tuned_by", content["tuned_by"]) for row in content["rows"]}
    least, most = min(counts), max(counts)
    if least < most:
        return f"{least} to {most} seeds"
    return "one seed" if most == 1 else f"{most} seeds"


def _origin(made: Mapping[str, Any]) -> str:
    """When, from which commit and on what results were made."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    commit_text = f", commit {made['commit']}" if made["commit"] else ""
    return f"{made['date']}{commit_text}; {made['processor']}; {versions}."


def _size(rows: Sequence[Mapping[str, Any]]) -> str:
    """How long was trained, and on how many images was tested."""
    row = page.first_tested(rows)
    if row is None:
        return "Every run diverged."
    return (
        f"{row['epochs']} epochs, {row['steps']} steps, {row['test_count']:,} test images{_binomial(rows)}."
    )


def _binomial(rows: Sequence[Mapping[str, Any]]) -> str:
    errors = [row["standard_error"] for row in rows if row["standard_error"] is not None]
    return f" (binomial standard error at most {100 * max(errors):.1f} points)" if errors else ""


def _ways_table(rows: Sequence[Mapping[str, Any]], metric: str, label: str) -> list[str]:
    # Without a grid nothing was chosen, and what was joined has its times part by part.
    chosen, timed = any(row["point"] for row in rows), any(row["step_ms"] is not None for row in rows)
    heads = [f"{label}, %, seed by seed", "mean", "standard deviation"]
    heads += [*(["chosen"] if chosen else []), *(["ms a step"] if timed else []), "parameters in training"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for row in rows:
        values = [100 * value for value in row["test"].get(metric, {}).values()]
        if not values:
            continue
        cells = [", ".join(f"{value:.2f}" for value in values), f"{statistics.mean(values):.2f}"]
        cells += [f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""]
        cells += [row["point"]] if chosen else []
        cells += ["" if row["step_ms"] is None else f"{row['step_ms']:.1f}"] if timed else []
        cells += ["" if row["train_parameters"] is None else f"{row['train_parameters']:,}"]
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return lines


def _parts_table(rows: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Seeds, and ms a step on the machine of each part:",
        "",
        "| | " + " | ".join(f"part {i}" for i, _ in enumerate(parts, 1)) + " |",
        "|---" * (1 + len(parts)) + "|",
    ]
    for row in rows:
        cells = []
        for part in parts:
            way = part["ways"].get(row["label"], {"seeds": [], "step_ms": None})
            seeds, step = ", ".join(map(str, way["seeds"])), way["step_ms"]
            cells.append(seeds if step is None else f"{seeds}: {step:.1f} ms")
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return lines


def _tuning_table(content: Mapping[str, Any]) -> list[str]:
    name = metric_label(METRICS[content["task"]][0], "validation")
    lines = [
        f"Mean {name}, %, by which the point was chosen:",
        "",
        "| | " + " | ".join(content["points"]) + " |",
        "|---" * (1 + len(content["points"])) + "|",
    ]
    for row in content["rows"]:
        cells = ("diverged" if v is None else f"{100 * v:.2f}" for v in row["tuning"])
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return lines


def _difference_table(content: Mapping[str, Any]) -> list[str]:
    lines = [
        "Differences in points, seed by seed:",
        "",
        "| | differences | mean | 95 % interval |",
        "|---|---|---|---|",
    ]
    for d in content["differences"]:
        each = ", ".join(_points(value) for value in d["by_seed"].values())
        lines.append(f"| {d['label']} | {each} | {_points(d['mean'])} | {_interval(d)} |")
    searches = "one search in each part" if content.get("parts") else "one search"
    return [*lines, "", page.INTERVALS.format(count=len(content["differences"]), searches=searches)]


def _interval(d: Mapping[str, Any]) -> str:
    if d["low"] is None:
        return ""
    return "no spread" if d["equal"] else f"{_points(d['low'])} to {_points(d['high'])}"
