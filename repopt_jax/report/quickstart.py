"""The whole method on one command: search, train in several ways, check, deploy, report.

    OUT/comparison.json, searches/, runs/   the comparison, see `compare`
    OUT/equivalence.json                    training the CSLA network compared with training the plain one
                                            with `repopt_mask`
    OUT/deploy/<way>/                       the first seed of each way as plain convolutions
    OUT/report.html, report.json, report.md, report/

Results that exist already and were made from the same inputs are reused.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optax

from repopt_jax._version import __version__
from repopt_jax.deploy.network import Deployed, deploy, load_deployed
from repopt_jax.optim.sgd import repopt_mask
from repopt_jax.report import monitor, records, report
from repopt_jax.report.compare import Results, compare
from repopt_jax.report.comparison import Comparison, search_of
from repopt_jax.report.gallery import answers, gallery
from repopt_jax.surgery.prepare import Mode
from repopt_jax.train.build import config_check
from repopt_jax.train.config import SEARCH, Config, to_json
from repopt_jax.train.rules import validate
from repopt_jax.train.rundir import read_json, replace_file
from repopt_jax.train.tasks import METRICS
from repopt_jax.verify import equivalence as verify

Log = Callable[[str], None]

# Way -> mode, scales, what it is called.
WAYS: dict[str, tuple[str, str, str]] = {
    "plain": ("plain", "", "plain SGD"),
    "repopt": ("repopt", f"{SEARCH}search", "RepOpt, searched scales"),
    "depth": ("repopt", "depth", "RepOpt, depth rule"),
    "repvgg": ("repvgg", "", "RepVGG"),
}
# Task -> the ways that are compared, and the default number of seeds of each.
COMPARED = {"classify": (tuple(WAYS), 2), "detect": (("plain", "repopt", "repvgg"), 1)}
# Task -> steps and batch size of the check: float64 is slow, and the equivalence holds for every size.
CHECKED = {"classify": (50, 16), "detect": (10, 4)}


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """The results of `quickstart`: the comparison, the deployments by way, the check, and the path of the
    report."""

    results: Results
    deployed: dict[str, dict[str, Any]]
    equivalence: dict[str, Any]
    page: Path


def quickstart(
    comparison: Comparison,
    out_dir: str | Path,
    *,
    count: int | None = None,
    source: str | None = None,
    log: Log = lambda line: None,
    command: str = "",
) -> Quickstart:
    """Runs the whole method in `out_dir`.

    Args:
      comparison: the ways of training, at least one of them of mode "repopt"; `comparison_of` makes one of a
        config.
      out_dir: a new or empty folder, or that of an earlier quickstart of an equal comparison, which is
        continued or reused.
      count, source: processes that make runs side by side, and what they import, as `compare` takes them.
      log: called with each line of progress.
      command: the command line, for the report.

    Raises:
      ValueError: no way of mode "repopt", or as `compare`, `deploy.deploy`.
      OSError, ChildProcessError: as `compare`.
    """
    checked = _checked(comparison)
    out_dir = Path(out_dir).expanduser().absolute()
    results = compare(comparison, out_dir, count=count, source=source, log=log)
    for name, folder in results.searches.items():
        verdict = monitor.verdict(records.read_history(folder))
        law = () if verdict.law is None else (verdict.law.sentence,)
        log(" ".join((f"Search {name}:", verdict.sentence, *law)))
    steps, _ = CHECKED[comparison.task]
    log(f"Check in float64: CSLA network against plain network with repopt_mask, {steps} steps")
    if checked.scales.startswith(SEARCH):
        checked.scales = str(results.searches[search_of(checked)] / "scales")
    equivalence = check_equivalence(checked, out_dir / "equivalence.json")
    log(_equivalence_line(equivalence))

    # The first run of each way that did not diverge.
    firsts = {way: done[0] for way, result in results.ways.items() if (done := result.finished)}
    deployed = _deploy({**firsts, **results.searches}, out_dir / "deploy", log)
    page = report.write_report(
        results,
        out_dir,
        deployed=deployed,
        equivalence=equivalence,
        answers=_answers(results, out_dir / "deploy"),
        galleries=_galleries(results, out_dir / "deploy"),
        command=command,
    )
    return Quickstart(results, deployed, equivalence, page)


def comparison_of(base: Config, *, seeds: int | None = None) -> Comparison:
    """The comparison of a config's network by the ways of its task, all with the config's settings.

    Args:
      base: the config of a plain run: network, data, epochs, optimizer.
      seeds: number of runs of each way; by default 2, or 1 for a detector.

    Raises:
      ValueError: `base` has a mode or scales of its own, or another optimizer than SGD, or cannot run.
    """
    problems = []
    if base.model.mode != "plain" or base.scales:
        problems.append(
            f"`base` has mode {base.model.mode!r} and scales {base.scales!r}, which quickstart sets itself: "
            "give the config of a plain run (mode 'plain', no scales)"
        )
    if base.optim.name != "sgd":
        problems.append(
            f"`optim.name` is {base.optim.name!r}: quickstart shows the method with SGD, as published; use "
            "`repopt search` and `repopt train` for others"
        )
    if seeds is not None and seeds < 1:
        problems.append(f"`seeds` is {seeds}; it must be at least 1")
    if problems:
        raise ValueError("; ".join(problems))
    validate(base)
    names, usual_seeds = COMPARED[base.task]
    return Comparison(
        title=f"RepOpt quickstart: {base.name}",
        ways={way: variant(base, *WAYS[way][:2]) for way in names},
        searches={"search": variant(base, "search", "")},
        labels={way: WAYS[way][2] for way in names},
        seeds=usual_seeds if seeds is None else seeds,
        validation=base.data.validation,
    )


def variant(base: Config, mode: str, scales: str) -> Config:
    """A copy of `base` for one way of training."""
    config = copy.deepcopy(base)
    config.model.mode, config.scales = mode, scales
    return config


def _checked(comparison: Comparison) -> Config:
    """A copy of the config whose equivalence is checked: with searched scales, if there is such a way."""
    ways = [c for c in comparison.ways.values() if c.model.mode == Mode.REPOPT and c.rules == "both"]
    if not ways:
        raise ValueError(
            "`comparison` has no way of mode 'repopt', whose equivalence could be checked: use `compare`"
        )
    searched = (config for config in ways if config.scales.startswith(SEARCH))
    return copy.deepcopy(next(searched, ways[0]))


def _deploy(runs: dict[str, Path], folder: Path, log: Log) -> dict[str, dict[str, Any]]:
    """Deploys the runs, given by way; way -> the fields of `deploy.Deployed`."""
    deployed = {}
    for way, run_dir in runs.items():
        done = deploy(run_dir, folder / way)
        log(f"Deploy {way}: {_deploy_line(done)}")
        deployed[way] = dataclasses.asdict(done)
    return deployed


def _answers(results: Results, deployed: Path) -> list[dict[str, Any]]:
    """What the deployed classifiers make of some test images."""
    if results.comparison.task != "classify":
        return []
    label = results.comparison.label
    ways = [way for way, result in results.ways.items() if result.finished]
    return answers({label(way): load_deployed(deployed / way) for way in ways}) if ways else []


def _galleries(results: Results, deployed: Path) -> dict[str, tuple[str, bytes]]:
    """What the deployed RepOpt network finds, and the annotated objects, for detectors."""
    if results.comparison.task != "detect":
        return {}
    ways = results.comparison.ways.items()
    way = next((w for w, c in ways if c.model.mode == Mode.REPOPT and results.ways[w].finished), None)
    if way is None:
        return {}
    network = load_deployed(deployed / way)
    caption = "What the deployed RepOpt network finds on test images: boxes with class and score, keypoints."
    return {
        "found": (caption, gallery(network)),
        "annotated": ("The same images as they are annotated.", gallery(network, annotated=True)),
    }


def check_equivalence(config: Config, path: Path) -> dict[str, Any]:
    """Compares CSLA with `repopt_mask`, with the config's scales on the first training images.

    The result is written to `path`, and reused if the one there is of the same config and version. The same
    check is made with weight decay in the wrong place, which must fail: a check that cannot fail shows
    nothing.

    Returns:
      The fields of `verify.Equivalence` with its two properties, `wrong_order_difference`, `inputs` and
      `reused`.
    """
    inputs = {"config": to_json(config), "version": __version__}
    stored = read_json(path)
    if isinstance(stored, dict) and stored.get("inputs") == inputs:
        return stored | {"reused": True}
    right = _verify(config, verify.nesterov_with_decay)
    wrong = _verify(config, _wrong_order)
    result = {
        **dataclasses.asdict(right),
        "max_difference": right.max_difference,
        "equivalent": right.equivalent,
        "wrong_order_difference": wrong.max_difference,
        "inputs": inputs,
        "reused": False,
    }
    replace_file(path, json.dumps(result, indent=2) + "\n")
    return result


def _verify(
    config: Config, recipe: Callable[[optax.GradientTransformation], optax.GradientTransformation]
) -> verify.Equivalence:
    steps, size = CHECKED[config.task]
    config = dataclasses.replace(config, batch_size=min(size, config.batch_size))
    check = config_check(config)
    normalise = config.normalise
    twin = verify.scale_by_layer_means(check.scales) if normalise else optax.identity()
    mask = repopt_mask(check.scales, normalise=normalise)
    optimizers = {"optimizer": recipe(mask), "twin_optimizer": recipe(twin)}
    return dataclasses.replace(check, **optimizers).run(steps=steps)


def _wrong_order(mask: optax.GradientTransformation) -> optax.GradientTransformation:
    """`verify.nesterov_with_decay` with the decay before the mask."""
    return optax.chain(verify.DECAY, mask, verify.NESTEROV)


def summary_lines(results: Results) -> Iterator[str]:
    """Yields the table of results as lines of text, and what the differences show."""
    comparison = results.comparison
    metrics = [
        metric
        for metric in METRICS[comparison.task]
        if any(metric.name in result.test for result in results.ways.values())
    ]
    tuned = len(comparison.points) > 1
    labels = (metric.label for metric in metrics)
    cells = [("way of training", *labels, *(["chosen"] if tuned else []), "ms a step", "parameters")]
    for way, result in results.ways.items():
        parameters = result.summary.get("train_parameters")
        cells.append(
            (
                comparison.label(way),
                *(_percent(result.test.get(metric.name, {})) for metric in metrics),
                *([", ".join(f"{value}" for value in result.point.values())] if tuned else []),
                "-" if result.step_ms is None else f"{result.step_ms:.1f}",
                "-" if parameters is None else f"{parameters:,}",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        first = line[0].ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))
        yield "  ".join([first, *others])
    if results.differences:
        yield ""
        yield from report.conclusions(results)


def _percent(values: Mapping[int, float]) -> str:
    if not values:
        return "-"
    numbers = [100 * value for value in values.values()]
    each = f" ({', '.join(f'{number:.1f}' for number in numbers)})" if len(numbers) > 1 else ""
    return f"{sum(numbers) / len(numbers):.2f} %{each}"


def _deploy_line(deployed: Deployed) -> str:
    reused = " (was there)" if deployed.reused else ""
    return (
        f"largest output difference {deployed.max_abs:.1e} ({deployed.max_rel:.1e} relative), "
        f"{deployed.train_parameters:,} parameters in training, {deployed.deploy_parameters:,} "
        f"deployed{reused}"
    )


def _equivalence_line(result: dict[str, Any]) -> str:
    reused = "reused: " if result["reused"] else ""
    verdict = "the same function" if result["equivalent"] else "NOT the same function"
    return (
        f"  {reused}{verdict}: largest relative difference {result['max_difference']:.1e} while kernels "
        f"moved by {result['movement']:.0%}; with weight decay misplaced "
        f"{result['wrong_order_difference']:.2g}"
    )
