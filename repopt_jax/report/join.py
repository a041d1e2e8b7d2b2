"""Results of one comparison from several machines, joined: each made some of the seeds, or of the ways."""

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repopt_jax.report import figures
from repopt_jax.report.report import difference_row, markdown, sentences, spread, starts_of
from repopt_jax.report.statistics import difference
from repopt_jax.train.tasks import METRICS

# What results that are joined have in common, and what is the same of a way wherever it was trained.
SAME = ("title", "task", "metric", "points", "validation")
SAME_OF_A_RUN = ("epochs", "steps")
SAME_OF_A_WAY = ("label", "point", "settings", "train_parameters", "test_count")
# What only the machine that has the runs knows: figures of its page, networks that it deployed.
LEFT_OUT = {"deployed": {}, "equivalence": None, "searches": []}


def join(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The results of all seeds and ways, from those of some.

    Means, deviations, differences and what they show are computed anew from the values of all seeds. The
    differences are those that a part has, and of a way in none of these the one from the first way; each is
    over the seeds that both ways have.

    Args:
      results: name for messages -> what a results file holds, as `read_results` gives it; what was joined
        already can be joined with more.

    Raises:
      ValueError: fewer than two, other comparisons or settings, or a seed of a way twice; it lists all
        problems.
    """
    problems = list(_problems(results))
    if problems:
        raise ValueError("these results cannot be joined: " + "; ".join(problems))
    contents = list(results.values())
    first = contents[0]
    rows = {way: _joined(found, results) for way, found in _rows(results).items()}
    tests = {
        way: {int(seed): value for seed, value in row["test"].get(first["metric"], {}).items()}
        for way, row in rows.items()
    }
    labels = {way: row["label"] for way, row in rows.items()}
    pairs = dict.fromkeys((d["way"], d["than"]) for content in contents for d in content["differences"])
    base, *ways = rows
    # A part without the way that its ways are compared with has no difference of theirs.
    lone = [(way, base) for way in ways if not any(way in pair for pair in pairs)]
    differences = [
        difference(way, than, tests[way], tests[than])
        for way, than in (*pairs, *lone)
        if tests[way].keys() & tests[than].keys()
    ]
    starts = starts_of({way: row.get("settings", {}) for way, row in rows.items()})
    return {
        **{name: first[name] for name in (*SAME, "about")},
        "made": {**first["made"], "command": ""},
        "parts": [part for content in contents for part in _parts(content)],
        "tuned_by": sum(content["tuned_by"] for content in contents),
        "conclusions": list(sentences(differences, labels, starts)),
        "rows": list(rows.values()),
        "differences": [difference_row(d, labels.__getitem__) for d in differences],
        **LEFT_OUT,
    }


def _problems(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if len(results) < 2:
        yield f"{len(results)} is not enough, give two or more"
        return
    if others := list(_others(results)):
        yield from others  # and nothing of their ways, which are others too
        return
    for way, found in _rows(results).items():
        (name, row), *others = found.items()
        for other, again in others:
            # Files of before `settings` was written have none.
            for field in SAME_OF_A_WAY:
                if field in row and field in again and row[field] != again[field]:
                    pair = f"{row[field]!r} in {name} and {again[field]!r} in {other}"
                    yield f"`{field}` of way {way!r} is {pair}"
        for (name, row), (other, again) in itertools.combinations(found.items(), 2):
            if twice := sorted(_seeds(row) & _seeds(again)):
                yield f"seeds {', '.join(map(str, twice))} of way {way!r} are in {name} and in {other}"


def _others(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What makes results those of other comparisons than the first."""
    (name, first), *others = results.items()
    for other, content in others:
        for field in SAME:
            if content[field] != first[field]:
                yield f"`{field}` is {first[field]!r} in {name} and {content[field]!r} in {other}"
        for field in SAME_OF_A_RUN:
            if content["made"][field] != first["made"][field]:
                pair = first["made"][field], content["made"][field]
                yield f"`{field}` is {pair[0]} in {name} and {pair[1]} in {other}"


def _seeds(row: Mapping[str, Any]) -> set[int]:
    return {int(seed) for values in row["test"].values() for seed in values}


def _rows(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Way -> file -> its row there, the ways in the order in which files have them."""
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for file, content in results.items():
        for row in content["rows"]:
            rows.setdefault(row["way"], {})[file] = row
    return rows


def _joined(
    found: Mapping[str, Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The row of a way, from its rows in several files."""
    rows, metric = list(found.values()), next(iter(results.values()))["metric"]
    test: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, values in row["test"].items():
            test.setdefault(name, {}).update(values)
    test = {
        name: dict(sorted(values.items(), key=lambda item: int(item[0]))) for name, values in test.items()
    }
    weights = [results[file]["tuned_by"] for file in found]
    tuning = [
        None if None in means else statistics.fmean(means, weights)
        for means in zip(*(row["tuning"] for row in rows))
    ]
    # One machine's: those of the others are in `parts`, and it is not told what they deployed.
    own = {"step_ms": None, "deploy_parameters": None, "deploy_error": None}
    made = {"test": test, "tuning": tuning, **spread(test, metric, rows[0]["test_count"])}
    return {**rows[0], **own, **made}


def _parts(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Where each part of results was made: command, machine, seeds and time of a step of each way there."""
    if "parts" in content:
        return content["parts"]
    ways = {
        row["label"]: {
            "seeds": [int(seed) for seed in row["test"].get(content["metric"], {})],
            "step_ms": row["step_ms"],
        }
        for row in content["rows"]
    }
    return [{**content["made"], "ways": ways}]


def read_results(path: str | Path) -> dict[str, Any]:
    """What a results file, PATH.json of `--results=PATH`, holds.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no results file of a comparison.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    wanted = {*SAME, "about", "made", "rows", "differences", "tuned_by"}
    missing = wanted - content.keys() if isinstance(content, dict) else wanted
    if missing:
        raise ValueError(
            f"{path} is not the results of a comparison, it has no {', '.join(sorted(missing))}: give the "
            ".json that `repopt compare --results` wrote"
        )
    return content


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
