"""The command `repopt`.

A caller's mistake becomes one sentence on standard error and exit code 1 (2 if the command line itself is
wrong); Ctrl-C gives 130, SIGTERM 143. With REPOPT_TRACEBACK=1 the traceback is shown as well.
"""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repopt_jax.cli import help as cli_help
from repopt_jax.cli.arguments import (
    Arguments,
    Command,
    UsageError,
    closest,
    number,
    parse,
    read_config,
    whole_number,
)
from repopt_jax.cli.errors import complain, report, sentence
from repopt_jax.cli.jobs import alone, joined

# Flags of `repopt bench`, "" for the defaults of `bench.Settings`.
BENCH_FLAGS: dict[str, str | None] = dict.fromkeys(
    (
        *("variant", "size", "batch", "dtype", "rounds", "classes", "networks", "memory", "tf32", "images"),
        "out",
    ),
    "",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `argv` is without the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except BaseException as error:
        code = report(error)
        if code is None:
            raise
        return code


def _dispatch(argv: list[str]) -> int:
    if not argv:
        sys.stderr.write(cli_help.OVERVIEW)
        return 2
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        _say(cli_help.OVERVIEW.rstrip())
        return 0
    if name == "--version":
        from repopt_jax._version import __version__

        _say(__version__)
        return 0
    command = _commands().get(name)
    if command is None:
        raise UsageError(
            f"unknown command {name!r}{closest(name, _commands())}; one of {', '.join(_commands())}"
        )
    if any(argument in ("-h", "--help") for argument in rest):
        _say(command.help.rstrip())
        return 0
    return command.act(parse(rest, command))


def _commands() -> dict[str, Command]:
    run_flags: dict[str, str | None] = {"run": None, "data_dir": "", "checkpoint": ""}
    job_flags: dict[str, str | None] = {"coordinator": "", "processes": "", "process": ""}
    return {
        "quickstart": Command(
            alone(_quickstart),
            cli_help.QUICKSTART,
            {"out": "runs/quickstart", "seeds": ""},
            "digits:plain",
            True,
        ),
        "search": Command(joined(_search), cli_help.SEARCH, {"out": None, **job_flags}, takes_config=True),
        "train": Command(joined(_train), cli_help.TRAIN, {"out": None, **job_flags}, takes_config=True),
        "eval": Command(alone(_eval), cli_help.EVAL, run_flags),
        "deploy": Command(alone(_deploy), cli_help.DEPLOY, {**run_flags, "out": None}),
        "predict": Command(
            _predict,
            cli_help.PREDICT,
            {"run": None, "out": "", "threshold": ""},
            positional=("image",),
        ),
        "verify": Command(
            _verify,
            cli_help.VERIFY,
            {"check": "", "steps": "", "tolerance": "", "layers": "5"},
            config="",
            takes_config=True,
        ),
        "convert": Command(
            _convert,
            cli_help.CONVERT,
            {"model": "", "kind": "", "classes": "0", "key": "", "to": ""},
            positional=("in", "out"),
        ),
        "bench": Command(alone(_bench), cli_help.BENCH, BENCH_FLAGS, positional=("parts",)),
    }


def _quickstart(arguments: Arguments) -> int:
    asked = arguments.flags["seeds"]
    seeds = whole_number("seeds", asked) if asked else None
    base = read_config(arguments)
    out = Path(arguments.flags["out"]).expanduser().absolute()
    with _computing(), _kept(out):
        # Many of the runs differ by their seed or their scales alone: what is compiled for one serves all.
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            import jax

            jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        from repopt_jax.report.quickstart import quickstart, summary_lines

        source = " ".join([str(arguments.config), *arguments.overrides])
        done = quickstart(base, out, seeds=seeds, say=_say, source=source)
    _say("", *summary_lines(done.rows), "", f"Report: {done.page}")
    if not done.equivalence["equivalent"]:
        raise ValueError(
            "the CSLA network and the plain network with repopt_mask did NOT train to the same function: "
            f"largest relative difference {done.equivalence['max_difference']:.1e}; see the report"
        )
    return 0


def _search(arguments: Arguments) -> int:
    config = read_config(arguments)
    if config.model.kind != "search":
        raise ValueError(
            f"`model.kind` is {config.model.kind!r}: `repopt search` needs a config of kind 'search'; use "
            "`repopt train` for the others, or add --config.model.kind=search"
        )
    stopped, out = _run(config, arguments)
    if stopped:
        return stopped
    from repopt_jax.report import monitor, records
    from repopt_jax.train import processes

    if not processes.is_first():  # one draws and tells
        return 0

    history = records.read_history(out)
    verdict = monitor.verdict(history)
    _say(verdict.sentence, *verdict.notes, f"Scales: {out / 'scales'}")
    try:
        from repopt_jax.report import report

        _say(f"How they moved: {', '.join(map(str, report.draw_search(history, out / 'report')))}")
    except ModuleNotFoundError as error:  # the search is done all the same
        _say(f"No pictures: {sentence(error)}")
    _say(f"Next: {_after_search(arguments, config, out)}")
    return 0


def _after_search(arguments: Arguments, config: Any, out: Path) -> str:
    """The command that trains a plain network with the scales that the search of `config` left in `out`, on
    the same data."""
    # Clipping steadies the search of a classifier, which needs it for nothing else; detectors are clipped in
    # all trainings.
    clipping = [] if config.task == "detect" else ["--config.optim.clip_norm=None"]
    overrides = [
        *arguments.overrides,
        "--config.model.kind=target",
        *clipping,
        f"--config.name={config.name}-repopt",
        f"--config.scales={out / 'scales'}",
        f"--out={out}-repopt",
    ]
    return shlex.join(["repopt", "train", f"--config={arguments.config}", *overrides])


def _train(arguments: Arguments) -> int:
    stopped, _ = _run(read_config(arguments), arguments)
    return stopped


def _eval(arguments: Arguments) -> int:
    with _computing():
        from repopt_jax.train import deploy, tasks

        flags = arguments.flags
        network = deploy.load_any(flags["run"], checkpoint=flags["checkpoint"] or None)
        found = deploy.evaluate(network, data_dir=flags["data_dir"] or None)
    count = f"{found['count']} images"
    if "accuracy" in found:
        count = f"{round(found['accuracy'] * found['count'])} of {count}"
    loss = "" if found["loss"] is None else f", loss {found['loss']:.4f}"
    measured = tasks.format_metrics(network.config.task, found)
    _say(f"{measured} ({count}){loss}; {network.config.name}, step {network.step}")
    return 0


def _predict(arguments: Arguments) -> int:
    flags = arguments.flags
    image = Path(flags["image"])
    out = Path(flags["out"]) if flags["out"] else image.with_name(f"{image.stem}-detected.png")
    with _computing():
        from repopt_jax.report import gallery
        from repopt_jax.train import deploy

        asked = number("threshold", flags["threshold"]) if flags["threshold"] else None
        network = deploy.load_any(flags["run"])
        found = gallery.predict(network, image, out, threshold=asked)
        threshold = gallery.least_score(network, asked)
    width = max([len(one.name) for one in found], default=0)
    for one in found:
        x1, y1, x2, y2 = one.box
        _say(f"{one.name:<{width}}  {one.score:.2f}  ({x1:.1f}, {y1:.1f}) to ({x2:.1f}, {y2:.1f})")
    _say(f"{len(found)} found with a score of at least {threshold:g}. Picture: {out.absolute()}")
    return 0


def _deploy(arguments: Arguments) -> int:
    with _computing():
        from repopt_jax.train import deploy, tasks

        flags = arguments.flags
        out, checkpoint = Path(flags["out"]), flags["checkpoint"] or "latest"
        done = deploy.deploy(flags["run"], out, data_dir=flags["data_dir"] or None, checkpoint=checkpoint)
    task = done.config["task"]
    compared = f"{done.agreement:.2%} of {done.compared} test images"
    if task == "detect":
        compared = f"{done.agreement:.2%} of the locations of {done.compared} test images"
    _say(
        *(["Already deployed; nothing was done."] if done.reused else []),
        f"largest output difference {done.max_abs:.2e} ({done.max_rel:.2e} of the largest output), the same "
        f"class for {compared}",
        f"parameters {done.train_parameters:,} in training, {done.deploy_parameters:,} deployed",
        f"deployed: {tasks.format_metrics(task, done.test)} of {done.test_count} images",
        f"Network: {out.absolute()}",
    )
    return 0


def _convert(arguments: Arguments) -> int:
    flags = arguments.flags
    classes = whole_number("classes", flags["classes"])
    from repopt_jax.train.deploy import convert

    options = {name: flags[name] for name in ("model", "kind", "key", "to")}
    lines = convert(flags["in"], flags["out"], classes=classes, **options)
    _say(*lines, f"Written: {Path(flags['out']).expanduser().absolute()}")
    return 0


def _bench(arguments: Arguments) -> int:
    flags = arguments.flags
    with _computing():
        from repopt_jax import bench
        from repopt_jax.bench import results

        parts = flags["parts"].split(",")
        if unknown := [part for part in parts if part not in (*bench.PARTS, "all")]:
            hint = closest(unknown[0], (*bench.PARTS, "all"))
            raise UsageError(
                f"unknown part {unknown[0]!r}{hint}; parts are {', '.join(bench.PARTS)} and all, and several "
                "are joined by commas"
            )
        settings = bench.Settings(**_bench_settings(flags))
        given = [f"--{name}={flags[name]}" for name in BENCH_FLAGS if flags[name]]
        command = shlex.join(["repopt", "bench", flags["parts"], *given])
        out = Path(flags["out"]).expanduser().absolute() if flags["out"] else None
        done = bench.bench(parts, settings, out=out, command=command)
    _say(results.markdown(done).rstrip(), *([f"Results: {out}.json"] if out else []))
    return 0


def _bench_settings(flags: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `bench.Settings` that the command line gives."""
    fields: dict[str, Any] = {name: flags[name] for name in ("variant", "images") if flags[name]}
    fields |= {name: whole_number(name, flags[name]) for name in ("size", "rounds", "classes") if flags[name]}
    if flags["memory"]:
        fields["memory"] = number("memory", flags["memory"])
    if flags["batch"]:
        fields["batches"] = tuple(whole_number("batch", value) for value in flags["batch"].split(","))
    for flag, field in (("dtype", "dtypes"), ("networks", "networks")):
        if flags[flag]:
            fields[field] = tuple(flags[flag].split(","))
    if flags["tf32"]:
        if flags["tf32"] not in ("yes", "no"):
            raise UsageError(f"--tf32={flags['tf32']} must be yes or no")
        fields["tf32"] = flags["tf32"] == "yes"
    return fields


def _verify(arguments: Arguments) -> int:
    flags = arguments.flags
    if bool(arguments.config) == bool(flags["check"]):
        raise UsageError("one of --config (a training config) and --check (a file of your own) must be given")
    if flags["check"] and arguments.overrides:
        raise UsageError(f"{arguments.overrides[0]} changes a config, and --check is none")
    steps = whole_number("steps", flags["steps"]) if flags["steps"] else None
    layers = None if flags["layers"] == "all" else whole_number("layers", flags["layers"])
    tolerance = number("tolerance", flags["tolerance"]) if flags["tolerance"] else None
    for name, value in (("steps", steps), ("layers", layers)):
        if value is not None and value < 1:
            raise UsageError(f"--{name}={value} must be at least 1")
    with _computing():
        if flags["check"]:
            from repopt_jax.verify import equivalence as verify

            check = verify.load_check(flags["check"])
        else:
            config = read_config(arguments)
            from repopt_jax.train.checking import config_check

            check, steps = config_check(config), steps or 10
        result = check.run(steps=steps, tolerance=tolerance)
    worst = result.worst(layers)
    width = max(len(path) for path, _ in worst)
    _say(
        f"Compared: {result.compared}; kernels moved by {result.movement:.2%}",
        f"Largest relative differences, of {len(result.differences)} parameters and statistics:",
        *(f"  {path:<{width}}  {difference:.1e}" for path, difference in worst),
        f"  {'loss':<{width}}  {result.loss_difference:.1e}",
    )
    if result.equivalent:
        _say(f"Equivalent: no difference above {result.tolerance:g}")
        return 0
    _say("NOT equivalent")
    complain(
        f"not equivalent: the largest relative difference is {result.max_difference:.1e}, the tolerance "
        f"{result.tolerance:g}; likely reason: {'; and '.join(result.reasons)}"
    )
    return 1


def _run(config: Any, arguments: Arguments) -> tuple[int, Path]:
    """Trains and tells what came of it; the first result is the exit code of what stopped it, or 0."""
    out = Path(arguments.flags["out"]).expanduser().absolute()
    with _computing(), _kept(out):
        from repopt_jax.train import processes, run, tasks

        with processes.stop_on_signals() as stop:
            done = run(config, out, stop=stop)
    if not done.finished:
        complain(f"stopped at step {done.steps}; {_how_to_continue(out)}")
        return stop.exit_code, out
    published = "" if done.published is None else f" (published: {done.published:.2%})"
    speed = "" if done.step_ms_median is None else f", {done.step_ms_median:.1f} ms a step"
    measured = tasks.format_metrics(done.task, done.test)
    _say(
        f"{'Already finished: ' if done.reused else ''}{done.name}: {measured} "
        f"of {done.test_count} images{published}, {done.train_parameters:,} parameters{speed}, "
        f"{done.wall_s:.0f} s",
        f"Run: {out}",
    )
    return 0, out


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


@contextlib.contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Gives a Ctrl-C the words that say what is left of the work in `out`."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {_how_to_continue(out)}") from error


def _how_to_continue(out: Path) -> str:
    steps = [int(p.parent.name) for p in out.glob("checkpoints/*/manifest.json") if p.parent.name.isdigit()]
    if not steps:
        return "what is finished is kept: run the same command again to continue"
    return (
        f"the last checkpoint (step {max(steps)}, in {out / 'checkpoints'}) is whole: run the same command "
        "again to continue from it"
    )


@contextlib.contextmanager
def _computing() -> Iterator[None]:
    """Shows the trainer's own log lines as they are, once, whatever libraries do to the root logger."""
    handler = logging.StreamHandler()
    ours = logging.getLogger("repopt_jax")
    level, propagate = ours.level, ours.propagate
    ours.addHandler(handler)
    # Of several processes one tells how it goes; warnings come from all.
    jax = sys.modules.get("jax")
    ours.setLevel(logging.INFO if jax is None or jax.process_index() == 0 else logging.WARNING)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagate
