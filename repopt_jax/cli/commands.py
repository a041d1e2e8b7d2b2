"""The commands of `repopt`, each a function of the parsed options that returns the exit code.

Their docstrings are what `repopt COMMAND --help` prints. The library is imported inside the functions, so
that help does not wait for it.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from repopt_jax.cli.config import read_config, with_overrides
from repopt_jax.cli.errors import UsageError, print_error, sentence
from repopt_jax.cli.jobs import distributed, single_process
from repopt_jax.hints import did_you_mean


@single_process
def quickstart(args: argparse.Namespace) -> int:
    """Search, train, deploy and report, on handwritten digits or (--config=scenes) with a detector.

    Compares plain SGD, RepOpt and RepVGG on a network that shows what they are good for, with the same seeds
    and learning rates for each, chosen on held-out images; checks the equivalence, deploys, and writes a
    report. A config without a comparison of its own is trained in each way with its settings. Run again, it
    goes on, or reuses what is finished."""
    out = _absolute(args.out)
    comparison = _comparison(args)
    with _logging(), _interruptible(out):
        _keep_compiled(out)
        from repopt_jax.report.quickstart import quickstart, summary_lines

        options = {"count": args.workers, "source": args.config, "log": _print}
        done = quickstart(comparison, out, **options, command=args.named or args.command_line)
        _copy_results(out, args.results)
    _print("", *summary_lines(done.results), "", f"Report: {done.page}")
    if not done.equivalence["equivalent"]:
        raise ValueError(
            "the CSLA network and the plain network with repopt_mask did NOT train to the same function: "
            f"largest relative difference {done.equivalence['max_difference']:.1e}; see the report"
        )
    return 0


@single_process
def compare(args: argparse.Namespace) -> int:
    """Compare ways of training, each with the same seeds and the same grid of settings.

    The config file's get_comparison(arg) says what is compared (report.comparison.Comparison). Every way is
    trained at each point of the grid; held-out training images choose; the test images are read once, at the
    end. Writes a report, with paired intervals. A stopped comparison goes on where it was. Example:

      repopt compare --config=deep_digits --out=runs/deep_digits"""
    out = _absolute(args.out)
    comparison = _comparison(args)
    with _logging(), _interruptible(out):
        _keep_compiled(out)
        from repopt_jax.report.compare import compare
        from repopt_jax.report.quickstart import summary_lines
        from repopt_jax.report.report import write_report

        results = compare(comparison, out, count=args.workers, source=args.config, log=_print)
        page = write_report(results, out, command=args.named or args.command_line)
        _copy_results(out, args.results)
    _print("", *summary_lines(results), "", f"Report: {page}")
    return 0


def join(args: argparse.Namespace) -> int:
    """Join the results of a comparison that several machines made.

    Each made some of the seeds or ways (--ways). RESULTS are files that `repopt compare --results=PATH`
    wrote, or this command: of the same comparison, and no seed of a way twice. Means, intervals and
    conclusions are computed anew. A comparison with a grid is shared by ways, as each part chooses for
    itself. Example, for three seeds:

      repopt compare --config=cifar10_small --seeds=2 --out=runs/here --results=here
      repopt compare --config=cifar10_small --config.seed=2 --seeds=1 --out=runs/there --results=there
      repopt join here.json there.json --results=both"""
    from repopt_jax.report.join import join
    from repopt_jax.report.results import read_results, write_results

    out = _absolute(args.results)
    files = {_absolute(file).resolve(): file for file in args.files}
    if len(files) < len(args.files):
        raise UsageError(f"{', '.join(args.files)} are not all different files")
    if Path(f"{out}.json").resolve() in files:
        raise UsageError(f"--results={args.results} would replace {args.results}.json, which is joined")
    joined = join({file: read_results(file) for file in files.values()})
    write_results(joined, out)
    for row in joined["rows"]:
        values = row["test"].get(joined["metric"], {}).values()
        _print(f"{row['label']}: {', '.join(f'{100 * value:.2f}' for value in values)}")
    _print("", *joined["conclusions"], "", f"Results: {out}.json")
    return 0


def print_config(args: argparse.Namespace) -> int:
    """Prints the config, or the comparison, that a command would run, as a file that gives it again. Nothing
    is checked that only a run needs: data, scales, devices."""
    from repopt_jax.cli.printed import python_file

    if args.command in (quickstart, compare):
        found = _comparison(args)
    elif args.command is prune:
        found = _pruning(args)
    elif args.config is None:
        raise UsageError("--print-config prints the config of --config, which is missing")
    else:
        found = read_config(args.config, args.overrides)
    _print(python_file(found, args.command_line).rstrip("\n"))
    return 0


def _copy_results(out: Path, results: str) -> None:
    """Writes the report in `out` as results files, where it is asked for, without what names folders of this
    machine."""
    if not results:
        return
    from repopt_jax.report.results import write_results

    content = json.loads((out / "report.json").read_text(encoding="utf-8"))
    content.pop("runs")
    (content["equivalence"] or {}).pop("inputs", None)
    for deployed in content["deployed"].values():
        for name in ("run", "config"):
            deployed.pop(name)
    write_results(content, _absolute(results))


def _comparison(args: argparse.Namespace) -> Any:
    """The comparison that the options name, with the overrides in each of its configs."""
    from repopt_jax.report.comparison import Comparison, load_comparison
    from repopt_jax.report.quickstart import comparison_of

    found = load_comparison(args.config)
    if not isinstance(found, Comparison):
        found = comparison_of(with_overrides(found, args.overrides), seeds=args.seeds)
        return found if args.ways is None else found.of(args.ways)
    given = [override.removeprefix("--config.").partition("=")[0] for override in args.overrides]
    own = ("name", "scales", "data.validation", *found.grid)
    if refused := [name for name in given if name in own]:
        raise UsageError(
            f"--config.{refused[0]} is set by the comparison, for each way and run: change it in "
            f"{args.config}"
        )
    changed = {
        kind: {name: with_overrides(config, args.overrides) for name, config in given.items()}
        for kind, given in (("ways", found.ways), ("searches", found.searches))
    }
    seeds = found.seeds if args.seeds is None else args.seeds
    found = dataclasses.replace(found, **changed, seeds=seeds)
    return found if args.ways is None else found.of(args.ways)


def _keep_compiled(out: Path) -> None:
    """Keeps compiled programs in `out`: many of the runs differ only in their seed or their scales, and use
    the same ones. The processes that the command starts inherit it."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    settings = {
        "jax_compilation_cache_dir": str(out / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@distributed
def search(args: argparse.Namespace) -> int:
    """Find scales by a hyper-search.

    Trains a network in mode "search", says whether its scales have settled, and writes them to DIR/scales.
    Example:

      repopt search --config=digits:search --out=runs/digits/search"""
    config = read_config(args.config, args.overrides)
    if config.model.mode != "search":
        raise ValueError(
            f"`model.mode` is {config.model.mode!r}: `repopt search` needs a config of mode 'search'; use "
            "`repopt train` for the others, or add --config.model.mode=search"
        )
    out = _absolute(args.out)
    if exit_code := _run(config, out):
        return exit_code
    from repopt_jax.report import monitor, records
    from repopt_jax.train import processes

    if not processes.is_first():
        return 0
    history = records.read_history(out)
    verdict = monitor.verdict(history)
    _print(*verdict.lines, f"Scales: {out / 'scales'}")
    try:
        from repopt_jax.report import report

        _print(f"How they moved: {', '.join(map(str, report.draw_search(history, out / 'report')))}")
    except ModuleNotFoundError as error:  # the search has succeeded without pictures
        _print(f"No pictures: {sentence(error)}")
    _print(f"Next: {command_after_search(config, out, args.config, args.overrides)}")
    return 0


def command_after_search(config: Any, out: Path, file_and_arg: str, overrides: Sequence[str]) -> str:
    """Returns the command that trains a plain network on the same data with the scales in `out`: what belongs
    to the search alone, its published accuracy too, goes back to its default."""
    from repopt_jax.train.config import settings_of

    own = [
        f"--config.{name}={default}"
        for name, value, default, rules, _ in settings_of(config)
        if value != default
        and (name == "published" or "repopt" not in rules["only"].get("model.mode", ["repopt"]))
    ]
    # Classifiers need clipping only in the search, detectors in every training.
    clipping = [] if config.task == "detect" else ["--config.optim.clip_norm=None"]
    changes = [
        "--config.model.mode=repopt",
        *own,
        *clipping,
        f"--config.name={config.name}-repopt",
        f"--config.scales={out / 'scales'}",
        f"--out={out}-repopt",
    ]
    return shlex.join(["repopt", "train", f"--config={file_and_arg}", *overrides, *changes])


@distributed
def train(args: argparse.Namespace) -> int:
    """Train a network.

    --config.model.mode says in which way; mode repopt takes --config.scales: ones, depth, or the folder that
    a search wrote. Example:

      repopt train --config=digits:repopt --config.scales=runs/digits/search/scales --out=runs/repopt"""
    return _run(read_config(args.config, args.overrides), _absolute(args.out))


@single_process
def prune(args: argparse.Namespace) -> int:
    """Prune a run's network to a share of its computations (ResRep).

    Trains the network on, with compactors that learn which channels can go, removes these, and compares
    accuracy and multiply-accumulates. The smaller network is in DIR/deployed. The training takes the run's
    data and length and the published optimizer (a cosine from rate 0.01); --config.FIELD=VALUE sets fields of
    its config, those of the method in --config.prune. Example:

      repopt prune --run=runs/plain --target=0.5 --out=runs/half --config.prune.strength=1e-3"""
    out = _absolute(args.out)
    with _logging(), _interruptible(out):
        from repopt_jax.deploy.pruning import DEPLOYED, prune
        from repopt_jax.train import Summary, processes
        from repopt_jax.train.tasks import format_metrics

        config = _pruning(args)
        with processes.stop_on_signals() as stop:
            done = prune(config, out, stop=stop)
    if isinstance(done, Summary):
        print_error(f"stopped at step {done.steps}; {_how_to_continue(out)}")
        return stop.exit_code
    tests = (done.test_before, done.test_trained, done.test_after)
    before, trained, after = (format_metrics(config.task, test) for test in tests)
    width = max(map(len, done.widths))
    _print(
        *(["Already pruned; nothing was done."] if done.reused else []),
        f"{'layer':<{width}}  inputs -> outputs",
        *(
            f"{path:<{width}}  {inputs} -> {outputs}, was {was_inputs} -> {was_outputs}"
            for path, (was_inputs, was_outputs, inputs, outputs) in done.widths.items()
        ),
        f"multiply-accumulates of an image: {done.macs_before:,} before, {done.macs_after:,} after, "
        f"{done.macs_after / done.macs_before:.1%} (target {done.target:.1%})",
        f"parameters: {done.parameters_before:,} before, {done.parameters_after:,} after",
        f"of {done.test_count} images: {before} before; {trained} with compactors; {after} after",
        f"largest output difference of the last two {done.max_abs:.2e} ({done.max_rel:.2e} of the largest)",
        f"Network: {out / DEPLOYED}",
    )
    if done.removed < done.masked:
        _print(
            f"{done.masked - done.removed} of {done.masked} masked channels have not become zero and stay: "
            "train longer, or with a larger prune.strength or a smaller prune.momentum"
        )
    return 0


def _pruning(args: argparse.Namespace) -> Any:
    from repopt_jax.deploy import prune_config

    made = prune_config(args.run, target=args.target, checkpoint=args.checkpoint or "latest")
    return with_overrides(made, args.overrides)


@single_process
def check_data(args: argparse.Namespace) -> int:
    """Decode every image of a config's data set, and list those that cannot be read.

    Exit code 0 if all can be read, else 1. A training leaves them out with --config.data.skip_bad=True.
    Example:

      repopt check-data --config=digits --config.data.source=folder --config.data.data_dir=images"""
    config = read_config(args.config, args.overrides)
    with _logging():
        from repopt_jax import data

        source = data.open_configured(config.data)
        bad = data.check_images(source)
    _print(*(one.problem for one in bad))
    total = source.info.num_train + source.info.num_eval
    _print(f"{source.info.name}: {total - len(bad)} of {total} images can be read")
    return 1 if bad else 0


@single_process
def evaluate(args: argparse.Namespace) -> int:
    """Measure the test accuracy (or AP) of a run, of a deployed network, or of an exported file.

    Accuracy and loss over the test images, each counted once; of a detector, COCO's average precision of
    boxes and of keypoints. An exported file is run by onnxruntime or, if it is StableHLO, by JAX; its images
    are those of --run, or of the folder --data-dir."""
    if not (args.run or args.model):
        raise UsageError("one of --run (a run or deployment) and --model (an exported file) must be given")
    if args.model and args.checkpoint:
        raise UsageError("--checkpoint is of a run, and --model holds one network")
    with _logging():
        from repopt_jax import deploy
        from repopt_jax.train import tasks

        if args.model:
            from repopt_jax.deploy import evaluate_file

            data, found = evaluate_file(args.model, run_dir=args.run or None, data_dir=args.data_dir or None)
            task, name = data.task, f"{data.name}, {args.model}"
        else:
            network = deploy.load_any(args.run, checkpoint=args.checkpoint or None)
            found = deploy.evaluate(network, data_dir=args.data_dir or None)
            task, name = network.config.task, f"{network.config.name}, step {network.step}"
    count = f"{found['count']} images"
    if "accuracy" in found:
        count = f"{round(found['accuracy'] * found['count'])} of {count}"
    loss = "" if found["loss"] is None else f", loss {found['loss']:.4f}"
    _print(f"{tasks.format_metrics(task, found)} ({count}){loss}; {name}")
    return 0


def predict(args: argparse.Namespace) -> int:
    """Say what a network makes of an image: classes, or objects, which are also drawn.

    Of a classifier, the likeliest classes with their probabilities. Of a detector, a picture with boxes,
    class and score, and keypoints."""
    if bool(args.run) == bool(args.model):
        raise UsageError("one of --run (a run or deployment) and --model (an exported file) must be given")
    image = Path(args.image)
    out = Path(args.out) if args.out else image.with_name(f"{image.stem}-detected.png")
    with _logging():
        from repopt_jax.report import gallery

        if args.model:
            from repopt_jax.export.runtime import open_file

            network = open_file(args.model)
        else:
            from repopt_jax import deploy

            network = deploy.load_any(args.run)
        if gallery.description(network).task == "classify":
            if args.out or args.threshold is not None:
                raise UsageError("--out and --threshold are for detectors, and this is a classifier")
            guesses = gallery.classify(network, image)
            width = max(len(guess.name) for guess in guesses)
            _print(*(f"{guess.name:<{width}}  {guess.probability:.2%}" for guess in guesses))
            return 0
        found = gallery.predict(network, image, out, threshold=args.threshold)
        threshold = gallery.least_score(network, args.threshold)
    width = max([len(one.name) for one in found], default=0)
    for one in found:
        x1, y1, x2, y2 = one.box
        _print(f"{one.name:<{width}}  {one.score:.2f}  ({x1:.1f}, {y1:.1f}) to ({x2:.1f}, {y2:.1f})")
    _print(f"{len(found)} found with a score of at least {threshold:g}. Picture: {out.absolute()}")
    return 0


@single_process
def deploy(args: argparse.Namespace) -> int:
    """Fuse a run into plain convolutions and save it.

    Fuses batch norms and branches, compares the outputs with those of the trained network on test images, and
    saves the weights with what is needed to rebuild the network."""
    out = Path(args.out)
    with _logging():
        from repopt_jax import deploy
        from repopt_jax.train import tasks

        done = deploy.deploy(
            args.run, out, data_dir=args.data_dir or None, checkpoint=args.checkpoint or "latest"
        )
    task = done.config["task"]
    compared = f"{done.agreement:.2%} of {done.compared} test images"
    if task == "detect":
        compared = f"{done.agreement:.2%} of the locations of {done.compared} test images"
    _print(
        *(["Already deployed; nothing was done."] if done.reused else []),
        f"largest output difference {done.max_abs:.2e} ({done.max_rel:.2e} of the largest output), the same "
        f"class for {compared}",
        f"parameters {done.train_parameters:,} in training, {done.deploy_parameters:,} deployed",
        f"deployed: {tasks.format_metrics(task, done.test)} of {done.test_count} images",
        f"Network: {out.absolute()}",
    )
    return 0


@single_process
def export(args: argparse.Namespace) -> int:
    """Export a run or a deployment to a file that runs elsewhere: StableHLO or ONNX.

    Writes the fused network with its weights, for any batch size, and what is needed to use it: classes,
    preprocessing, layout. Runs the file and compares it with the network on test images; FILE.html has what
    was measured. FORMAT is

      stablehlo   for JAX without this library, on CPU, GPU and TPU
      onnx        float32
      onnx-int8   INT8, its ranges found on training images; of a detector, the last layers stay float32.
                  Or a folder of repopt quantize as it is

    Examples:

      repopt export --run=runs/deployed --format=stablehlo --out=network.stablehlo --preprocess
      repopt export --run=runs/deployed --format=onnx --out=network.onnx"""
    with _logging():
        from repopt_jax.deploy import export
        from repopt_jax.interop.convert import refuse_existing
        from repopt_jax.report import export as report

        refuse_existing(report.page_of(_absolute(args.out)))
        done = export(
            args.run,
            args.out,
            format=args.format,
            layout=args.layout,
            checkpoint=args.checkpoint or None,
            data_dir=args.data_dir or None,
            preprocess=args.preprocess or "",
            decode=args.decode,
            weights=args.weights,
            scale_bits=args.scale_bits,
        )
    page = report.write_page(done, source=str(_absolute(args.run)), command=args.command_line)
    _print(
        *report.lines(done),
        f"File: {done.path.absolute()}, {done.size:,} bytes",
        f"Report: {page.absolute()}",
    )
    return 0


@single_process
def quantize(args: argparse.Namespace) -> int:
    """Quantize the network of a run, after training or by training on (--qat).

    Rounds kernels and inputs of all layers, and measures what it costs; DIR/report.html has the numbers by
    layer. DIR is a deployment, for repopt eval and repopt export. With --qat the network is trained on, at a
    tenth of its learning rate; --config.FIELD=VALUE sets fields of that training. Example:

      repopt quantize --run=runs/repopt --out=runs/repopt-int4 --bits=4 --keep-float=2"""
    out = _absolute(args.out)
    if args.overrides and not args.qat:
        raise UsageError(f"{args.overrides[0]} changes a training, and without --qat there is none")
    with _logging(), _interruptible(out / "training" if args.qat else out):
        from repopt_jax.deploy import Options, quantize_run
        from repopt_jax.report import quantization
        from repopt_jax.train import Summary, processes

        names = ("bits", "weight_bits", "scale_bits", "per", "calibration", "percentile", "images", "epochs")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if args.weights is not None:
            given["weight_range"] = args.weights
        options = Options(keep_float=args.keep_float, sensitivity=args.sensitivity, aware=args.qat, **given)
        with processes.stop_on_signals() as stop:
            done = quantize_run(
                args.run,
                out,
                options,
                config=lambda config: with_overrides(config, args.overrides),
                checkpoint=args.checkpoint or None,
                data_dir=args.data_dir or None,
                stop=stop if args.qat else None,
            )
    if isinstance(done, Summary):
        print_error(f"stopped at step {done.steps}; {_how_to_continue(out / 'training')}")
        return stop.exit_code
    _print(*(["Already quantized; nothing was done."] if done.reused else []), *quantization.lines(done))
    try:
        _print(f"Report: {quantization.write_page(done, out)}")
    except ModuleNotFoundError as error:  # the network is there without pictures
        _print(f"No report: {sentence(error)}")
    _print(f"Network: {out}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check that the training is that of the multi-branch network.

    Trains a network with re-parameterized gradients and its multi-branch counterpart under the ordinary
    optimizer, in float64 on the same batches, and compares them layer by layer. Exit code 0 if they stay
    equal; 1 if not, with the likely reason. float64 is slow: --config.batch_size=16 is enough. Example:

      repopt verify --config=digits:depth --config.batch_size=16"""
    if bool(args.config) == bool(args.check):
        raise UsageError("one of --config (a training config) and --check (a file of your own) must be given")
    if args.check and args.overrides:
        raise UsageError(f"{args.overrides[0]} changes a config, and --check has none")
    steps = args.steps
    with _logging():
        if args.check:
            from repopt_jax.verify.equivalence import load_check

            check = load_check(args.check)
        else:
            config = read_config(args.config, args.overrides)
            from repopt_jax.train.build import config_check

            check, steps = config_check(config), steps or 10
        result = check.run(steps=steps, tolerance=args.tolerance)
    worst = result.worst(args.layers)
    width = max(len(path) for path, _ in worst)
    _print(
        f"Compared: {result.compared}; kernels moved by {result.movement:.2%}",
        f"Largest relative differences, of {len(result.differences)} parameters and statistics:",
        *(f"  {path:<{width}}  {difference:.1e}" for path, difference in worst),
        f"  {'loss':<{width}}  {result.loss_difference:.1e}",
    )
    if result.equivalent:
        _print(f"Equivalent: no difference above {result.tolerance:g}")
        return 0
    _print("NOT equivalent")
    print_error(
        f"not equivalent: the largest relative difference is {result.max_difference:.1e}, the tolerance "
        f"{result.tolerance:g}; likely reason: {'; and '.join(result.reasons)}"
    )
    return 1


def convert(args: argparse.Namespace) -> int:
    """Convert PyTorch and safetensors files from and to our folders.

    Converts a PyTorch or safetensors file to a folder that interop.load_converted reads, or to such a file
    with other names; a run, deployment or converted folder to a file; a file of scales to a folder. Checks
    the number of parameters and, where PyTorch is installed, the outputs. Examples:

      repopt convert RepVGG-A0-train.pth a0 --model=repvgg-A0
      repopt convert runs/deployed b1.safetensors --to=timm"""
    from repopt_jax.deploy import convert

    options = {name: getattr(args, name) for name in ("model", "classes", "key", "to")}
    _print(*convert(args.source, args.target, **options), f"Written: {_absolute(args.target)}")
    return 0


def models(args: argparse.Namespace) -> int:
    """List the networks, with their sizes and published accuracy.

    Parameters are those that train, with branches where the network has some, and those that are deployed.
    Multiply-accumulates are of the deployed network for an image of the size in the table. The accuracy is
    what the authors report on ImageNet, in %; it is empty where they report none. Examples:

      repopt models repvgg
      repopt models 'mobileone-s?' --json"""
    from repopt_jax.cli import networks

    rows = networks.matching(args.pattern) if args.pattern else networks.networks()
    _print(*([json.dumps(rows, indent=1)] if args.json else networks.text(rows)))
    return 0


@single_process
def bench(args: argparse.Namespace) -> int:
    """Measure time and memory of updates, steps and inference.

    Measures the cost of re-parameterization, on the first device. In each round all candidates run, in
    another order each time, and are compared within the round. PARTS are separated by commas, or "all":

      update       SGD with decay: plain, repopt_mask, a stored multiplier; bytes/s beside those of a copy
      optimizers   AdamW, Lion and reparameterize, beside their plain counterparts
      step         training step and its memory: plain, RepOpt, search, RepVGG
      largest      the largest batch whose training step fits in the memory
      inference    deployed networks, fused and not
      torch        training step and update in PyTorch, on the same device
      conv         single convolutions: our forms for a CPU, XLA's, PyTorch's
      compile      compile time of a training step
      input        images/s of one core of the input pipeline, and the cores that the step needs"""
    with _logging():
        from repopt_jax import bench
        from repopt_jax.bench import results

        parts = (*bench.PARTS, "all")
        if unknown := [part for part in args.parts if part not in parts]:
            raise UsageError(
                f"unknown part {unknown[0]!r}{did_you_mean(unknown[0], parts)}; parts are "
                f"{', '.join(bench.PARTS)} and all, and several are separated by commas"
            )
        names = [field.name for field in dataclasses.fields(bench.Settings)]
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if "tf32" in given:
            given["tf32"] = given["tf32"] == "yes"
        out = _absolute(args.out) if args.out else None
        done = bench.bench(args.parts, bench.Settings(**given), out=out, command=args.command_line)
    _print(results.markdown(done).rstrip(), *([f"Results: {out}.json"] if out else []))
    return 0


def completion(args: argparse.Namespace) -> int:
    """Print the script with which a shell completes command lines.

    With it the tabulator key completes commands, options and their values, configs and their runs
    (--config=digits:), fields of a config (--config.optim.), networks, files and folders. To switch it on:

      bash   repopt completion bash > ~/.local/share/bash-completion/completions/repopt
             without the package bash-completion: eval "$(repopt completion bash)" in ~/.bashrc
      zsh    repopt completion zsh > ~/.zsh/completions/_repopt
             with fpath=(~/.zsh/completions $fpath) before compinit in ~/.zshrc
      fish   repopt completion fish > ~/.config/fish/completions/repopt.fish

    and open a new shell. The folder must be there (mkdir -p)."""
    from repopt_jax.cli.completion import script

    _print(script(args.shell).rstrip("\n"))
    return 0


def _run(config: Any, out: Path) -> int:
    """Trains, prints the result, and returns the exit code: that of the signal if one stopped the run."""
    with _logging(), _interruptible(out):
        from repopt_jax.train import processes, run, tasks

        with processes.stop_on_signals() as stop:
            done = run(config, out, stop=stop)
    if not done.finished:
        print_error(f"stopped at step {done.steps}; {_how_to_continue(out)}")
        return stop.exit_code
    published = "" if done.published is None else f" (published: {done.published:.2%})"
    speed = "" if done.step_ms_median is None else f", {done.step_ms_median:.1f} ms a step"
    measured = tasks.format_metrics(done.task, done.test, split=done.split)
    _print(
        f"{'Already finished: ' if done.reused else ''}{done.name}: {measured} of {done.test_count} images"
        f"{published}, {done.train_parameters:,} parameters{speed}, "
        f"{done.wall_s:.0f} s",
        f"Run: {out}",
    )
    return 0


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _print(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


@contextlib.contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Adds a message to Ctrl-C that says what is kept in `out`."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {_how_to_continue(out)}") from error


def _how_to_continue(out: Path) -> str:
    steps = [int(p.parent.name) for p in out.glob("checkpoints/*/manifest.json") if p.parent.name.isdigit()]
    if not steps:
        return "what is finished is kept: run the same command again to continue"
    return (
        f"the last checkpoint (step {max(steps)}, in {out / 'checkpoints'}) is complete: run the same "
        "command again to continue from it"
    )


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Prints the package's log messages once and unformatted, independently of the root logger."""
    handler = logging.StreamHandler()
    ours = logging.getLogger("repopt_jax")
    level, propagate = ours.level, ours.propagate
    ours.addHandler(handler)
    # Of several processes only the first logs progress; all log warnings.
    jax = sys.modules.get("jax")
    ours.setLevel(logging.INFO if jax is None or jax.process_index() == 0 else logging.WARNING)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagate
