"""The whole method on one command: search, extract scales, train, check, deploy, report.

    OUT/search/            the hyper-search; the scales that it found are in OUT/search/scales
    OUT/runs/<way>-<seed>/ plain SGD, RepOpt with searched scales, RepVGG (classifiers also the depth rule)
    OUT/equivalence.json   training the CSLA network compared with training the plain one with `repopt_mask`
    OUT/deploy/<way>/      the first seed of each way as plain convolutions
    OUT/report.html, report.json, report/

Results that exist already and were made from the same inputs are reused.
"""

import copy
import dataclasses
import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optax

from repopt_jax._version import __version__
from repopt_jax.optim.sgd import repopt_mask
from repopt_jax.report import monitor, records, report
from repopt_jax.report.gallery import gallery
from repopt_jax.train.build import config_check
from repopt_jax.train.config import Config, differing_fields, from_json, to_json, validate
from repopt_jax.train.deploy import Deployed, deploy, load_deployed
from repopt_jax.train.loop import run
from repopt_jax.train.rundir import PART, Summary, read_json, replace_file
from repopt_jax.train.tasks import METRICS, format_metrics
from repopt_jax.verify import equivalence as verify

Log = Callable[[str], None]

# Way -> mode, scales; None stands for what the search finds.
WAYS: dict[str, tuple[str, str | None]] = {
    "plain": ("plain", ""),
    "repopt": ("repopt", None),
    "depth": ("repopt", "depth"),
    "repvgg": ("repvgg", ""),
}
# Task -> the ways that are compared, and the default number of seeds of each.
COMPARED = {"classify": (tuple(WAYS), 2), "detect": (("plain", "repopt", "repvgg"), 1)}
# Task -> steps and batch size of the check: float64 is slow, and the equivalence holds for every size.
CHECKED = {"classify": (50, 16), "detect": (10, 4)}


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """The results of `quickstart`: table, check, verdict on the scales, and the path of the report."""

    rows: tuple[report.Row, ...]
    equivalence: dict[str, Any]
    verdict: monitor.Verdict
    page: Path


def quickstart(
    base: Config,
    out_dir: str | Path,
    *,
    seeds: int | None = None,
    log: Log = lambda line: None,
    source: str = "digits",
) -> Quickstart:
    """Runs the whole method in `out_dir`.

    Args:
      base: the config that all runs share: network, data, epochs, optimizer. Mode, scales, name and seed are
        set here.
      out_dir: a new or empty folder, or that of an earlier quickstart with an equal `base`, which is
        continued or reused.
      seeds: number of runs of each way of training, with seeds `base.seed`, `base.seed` + 1, ...; by default
        2, or 1 for a detector.
      log: called with each line of progress.
      source: config file and overrides, as on the command line, for the commands in the report that repeat
        the runs.

    Raises:
      ValueError: `seeds` below 1, or as `loop.run`, `deploy.deploy`.
      OSError, FloatingPointError: as `loop.run`.
    """
    _check(base, seeds)
    ways, usual_seeds = COMPARED[base.task]
    seeds = usual_seeds if seeds is None else seeds
    out_dir = Path(out_dir).expanduser().absolute()
    _claim(out_dir, base)

    log(f"Search: {base.epochs} epochs with trainable scales")
    search_dir = out_dir / "search"
    search = variant(base, "search", "search", "")
    log(_summary_line(run(search, search_dir)))
    scales = search_dir / "scales"
    verdict = monitor.verdict(records.read_history(search_dir))
    log(f"  scales in {scales}")
    log(f"  {verdict.sentence}")

    steps, _ = CHECKED[base.task]
    log(f"Check in float64: CSLA network against plain network with repopt_mask, {steps} steps")
    check = variant(base, "check", "repopt", str(scales))
    equivalence = check_equivalence(check, out_dir / "equivalence.json")
    log(_equivalence_line(equivalence))

    runs = _train(base, out_dir / "runs", scales, ways, seeds, log)
    firsts = {"search": search_dir} | {way: out_dir / "runs" / f"{way}-{base.seed}" for way in ways}
    deployed = _deploy(firsts, out_dir / "deploy", log)

    ordered = [records.read_run(folder) for folder in [*runs, search_dir]]
    configs = {search_dir: search, **runs}
    page = report.write_report(
        ordered,
        out_dir,
        title=f"RepOpt quickstart: {deployed[search_dir]['dataset']['name']}",
        deployed=deployed,
        equivalence=equivalence,
        commands=[_command(config, folder, source) for folder, config in configs.items()],
        galleries=_galleries(base, out_dir / "deploy"),
    )
    return Quickstart(tuple(report.table(ordered, deployed)), equivalence, verdict, page)


def _check(base: Config, seeds: int | None) -> None:
    """Raises ValueError before the search for what would fail after it."""
    problems = []
    if seeds is not None and seeds < 1:
        problems.append(f"`seeds` is {seeds}; it must be at least 1")
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
    if problems:
        raise ValueError("; ".join(problems))
    for mode in ("plain", "search"):
        validate(variant(base, mode, mode, ""))


def _claim(out_dir: Path, base: Config) -> None:
    """Writes `base` to the folder; refuses one that is neither new, empty nor of an equal `base`."""
    path = out_dir / "quickstart.json"
    stored = read_json(path)
    if stored is None:
        if others := [p.name for p in sorted(out_dir.glob("*")) if p.name != path.name + PART]:
            raise ValueError(
                f"`out_dir` {out_dir} is not empty and holds no quickstart "
                f"(it has {', '.join(others[:3])}); choose an empty or a new folder"
            )
        out_dir.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_json(base) + "\n")
    elif differing := differing_fields(from_json(json.dumps(stored)), base):
        raise ValueError(
            f"`out_dir` {out_dir} holds another quickstart; it differs in {', '.join(differing)} (there and "
            "here). Choose another folder, or remove that one"
        )


def _train(
    base: Config, folder: Path, scales: Path, ways: Sequence[str], seeds: int, log: Log
) -> dict[Path, Config]:
    """Trains every way with every seed; run folder -> config, the first seed of all ways first."""
    runs: dict[Path, Config] = {}
    for seed, way in itertools.product(range(base.seed, base.seed + seeds), ways):
        mode, rule = WAYS[way]
        config = variant(base, way, mode, str(scales) if rule is None else rule, seed=seed)
        log(f"Train: {report.label_of(mode, config.scales)}, seed {seed}")
        runs[folder / f"{way}-{seed}"] = config
        log(_summary_line(run(config, folder / f"{way}-{seed}")))
    return runs


def _deploy(runs: dict[str, Path], folder: Path, log: Log) -> dict[Path, dict[str, Any]]:
    """Deploys the runs, given by way; run folder -> the fields of `deploy.Deployed`."""
    deployed = {}
    for way, run_dir in runs.items():
        log(f"Deploy: {way}")
        done = deploy(run_dir, folder / way)
        log(_deploy_line(done))
        deployed[run_dir] = dataclasses.asdict(done)
    return deployed


def variant(base: Config, way: str, mode: str, scales: str, *, seed: int | None = None) -> Config:
    """Returns a copy of `base` for one run."""
    config = copy.deepcopy(base)
    config.name = f"quickstart-{way}" if seed is None else f"quickstart-{way}-{seed}"
    config.model.mode, config.scales = mode, scales
    config.seed = base.seed if seed is None else seed
    return config


def _galleries(base: Config, deployed: Path) -> dict[str, tuple[str, bytes]]:
    """Draws what the RepOpt network finds, and the annotated objects, for detectors."""
    if base.task != "detect":
        return {}
    network = load_deployed(deployed / "repopt")
    caption = "What the deployed RepOpt network finds on test images: boxes with class and score, keypoints."
    return {
        "found": (caption, gallery(network)),
        "annotated": ("The same images as they are annotated.", gallery(network, annotated=True)),
    }


def check_equivalence(config: Config, path: Path) -> dict[str, Any]:
    """Compares CSLA with `repopt_mask`, with the config's scales on the first training images.

    The result is written to `path`, and reused if it is there. The same check is made with weight decay in
    the wrong place, which must fail: a check that cannot fail shows nothing.

    Returns:
      The fields of `verify.Equivalence` with its two properties, `wrong_order_difference`, `inputs` and
      `reused`.
    """
    inputs = {"config": to_json(config), "version": __version__}
    stored = read_json(path, default={})
    if stored.get("inputs") == inputs:
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
    optimizers = {"optimizer": recipe(repopt_mask(check.scales)), "twin_optimizer": recipe(optax.identity())}
    return dataclasses.replace(check, **optimizers).run(steps=steps)


def _wrong_order(mask: optax.GradientTransformation) -> optax.GradientTransformation:
    """`verify.nesterov_with_decay` with the decay before the mask."""
    return optax.chain(optax.add_decayed_weights(4e-5), mask, optax.sgd(0.05, 0.9, nesterov=True))


def summary_lines(rows: Sequence[report.Row]) -> Iterator[str]:
    """Yields the table of results as lines of text."""
    known = [metric for task in METRICS.values() for metric in task]
    metrics = [metric for metric in known if any(metric.name in row.measured for row in rows)]
    labels = (metric.label for metric in metrics)
    cells = [("way of training", *labels, "ms a step", "parameters", "deployed", "deploy error")]
    for row in rows:
        deployed = row.deployed or {"deploy_parameters": 0, "max_rel": 0.0}
        cells.append(
            (
                row.label,
                *(_percent(row.measured.get(metric.name, ())) for metric in metrics),
                "-" if row.step_ms is None else f"{row.step_ms:.1f}",
                f"{row.train_parameters:,}",
                f"{deployed['deploy_parameters']:,}",
                f"{deployed['max_rel']:.1e}",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        first = line[0].ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))
        yield "  ".join([first, *others])


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "-"
    each = f" ({', '.join(f'{100 * value:.2f}' for value in values)})" if len(values) > 1 else ""
    return f"{100 * sum(values) / len(values):.2f} %{each}"


def _summary_line(summary: Summary) -> str:
    reused = "reused: " if summary.reused else ""
    measured = f"{format_metrics(summary.task, summary.test)} of {summary.test_count} images"
    speed = "" if summary.step_ms_median is None else f", {summary.step_ms_median:.1f} ms a step"
    return f"  {reused}{measured}{speed}, {summary.wall_s:.0f} s"


def _deploy_line(deployed: Deployed) -> str:
    reused = "reused: " if deployed.reused else ""
    return (
        f"  {reused}largest output difference {deployed.max_abs:.1e} ({deployed.max_rel:.1e} relative), "
        f"{deployed.train_parameters:,} parameters in training, {deployed.deploy_parameters:,} deployed"
    )


def _equivalence_line(result: dict[str, Any]) -> str:
    reused = "reused: " if result["reused"] else ""
    verdict = "the same function" if result["equivalent"] else "NOT the same function"
    return (
        f"  {reused}{verdict}: largest relative difference {result['max_difference']:.1e} while kernels "
        f"moved by {result['movement']:.0%}; with weight decay misplaced "
        f"{result['wrong_order_difference']:.2g}"
    )


def _command(config: Config, folder: Path, source: str) -> str:
    verb = "search" if config.model.mode == "search" else "train"
    fields = {
        "model.mode": config.model.mode,
        "scales": config.scales,
        "seed": config.seed,
        "name": config.name,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return f"repopt {verb} --config={source} {shlex.join([*overrides, f'--out={folder}'])}"
