"""The program `repopt`: its command line, and the dispatch to the functions of `commands`.

A mistake of the user is one sentence on standard error, with exit code 2 if it is on the command line and 1
otherwise; Ctrl-C gives 130, SIGTERM 143. Nothing here imports JAX, so that help and mistyped commands are
answered at once.
"""

import argparse
import inspect
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from repopt_jax._version import __version__
from repopt_jax.cli import commands, huge_pages
from repopt_jax.cli.errors import UsageError, fail, report
from repopt_jax.hints import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `argv` does not contain the program's name."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return fail(error, code=2)
    except SystemExit as done:  # argparse has printed help or the version
        return int(done.code or 0)
    try:
        if argv is None and args.computes:  # as a program of its own, not called by one
            huge_pages.restart()
        return args.command(args)
    except BaseException as error:
        code = report(error)
        if code is None:
            raise
        return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options of the command in `argv`.

    Besides its options, the namespace has `command`, the function that carries it out; `overrides`, each
    `--config.FIELD=VALUE` as typed; and `command_line`, for a shell.

    Raises:
      UsageError: an unknown command or option; an option that is repeated, has no value or a bad one; too few
        or too many arguments.
      SystemExit: help or the version was asked for and has been printed.
    """
    program, parsers = _parsers()
    if not argv:
        program.print_help(sys.stderr)
        program.exit(2)
    first, *rest = ("--help",) if argv[0] == "help" else argv
    if first.startswith("-"):
        program.check_options([first])
    elif first not in parsers:
        raise UsageError(
            f"unknown command {first!r}{did_you_mean(first, parsers)}; one of {', '.join(parsers)}"
        )
    elif "-h" in rest or "--help" in rest:
        rest = ["--help"]
    else:
        parsers[first].check_options(rest)
    args, extras = program.parse_known_args([first, *rest])
    args.overrides = _overrides(extras)
    args.command_line = shlex.join(["repopt", *argv])
    return args


def _overrides(extras: Sequence[str]) -> list[str]:
    """Returns the overrides `--config.FIELD=VALUE`, which may be typed as two arguments, from `extras`."""
    overrides = []
    arguments = iter(extras)
    for argument in arguments:
        if not argument.startswith("--config."):
            raise UsageError(f"unexpected argument {argument!r}: options are written --name=value")
        if "=" not in argument:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UsageError(f"option {argument} has no value: write {argument}=VALUE")
            argument = f"{argument}={value}"
        overrides.append(argument)
    return overrides


def _parsers() -> tuple["_Parser", dict[str, "_Parser"]]:
    """Returns the parser of the program, and those of its commands by name.

    The docstring of a command's function is its description.
    """
    program = _Parser(
        "repopt",
        description="Gradient and structural re-parameterization for JAX.",
        epilog="`repopt COMMAND --help` describes a command and its options.",
    )
    program.add_argument("--version", action="version", version=__version__)
    program.options.append("--version")
    added = program.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], *, computes: bool = True) -> _Parser:
        description = inspect.getdoc(command) or ""
        summary = description.partition("\n")[0].rstrip(".")
        parser = added.add_parser(name, description=description, help=summary)
        parser.set_defaults(command=command, computes=computes)
        return parser

    quickstart = add("quickstart", commands.quickstart)
    quickstart.option(
        "--out=DIR", "folder of all results (%(default)s)", type=path, default="runs/quickstart"
    )
    quickstart.comparison_options()
    quickstart.config_options(default="deep_digits")

    compare = add("compare", commands.compare)
    compare.option(
        "--out=DIR",
        "folder of the comparison. Run again, the command continues it, or makes its report anew",
        type=path,
        required=True,
    )
    compare.comparison_options()
    compare.config_options(required=True)

    for parser in (add("search", commands.search), add("train", commands.train)):
        parser.config_options(required=True)
        parser.option(
            "--out=DIR",
            "folder of the run. An unfinished run of the same config in it is continued, a finished one "
            "reported again; a folder with another run is refused",
            type=path,
            required=True,
        )
        parser.option(
            "--coordinator=HOST:PORT",
            "address of process 0 of a job of several processes; SLURM and TPU pods need none of the three",
            default="",
        )
        parser.option("--processes=N", "number of processes of the job", type=int)
        parser.option("--process=I", "index of this process, from 0", type=int)

    check = add("check-data", commands.check_data)
    check.config_options(required=True)

    prune = add("prune", commands.prune)
    prune.takes_config = True
    prune.option("--run=DIR", "folder of the run, of mode plain or repopt", type=path, required=True)
    prune.option(
        "--target=X", "share of the multiply-accumulates that is to stay (0.5)", type=float, default=0.5
    )
    prune.option(
        "--out=DIR",
        "folder of the pruning. Run again, the command continues it, or reports what is there",
        type=path,
        required=True,
    )
    prune.option("--checkpoint=WHICH", "of the run: latest (the default), best, or the number of a step")

    evaluate = add("eval", commands.evaluate)
    evaluate.option("--run=DIR", "folder of a run or of a deployment", type=path)
    evaluate.option("--model=FILE", "exported file, NAME.onnx or NAME.stablehlo", type=path)
    evaluate.checkpoint_options()

    predict = add("predict", commands.predict)
    predict.add_argument("image", metavar="IMAGE", type=path, help="PNG, JPEG, WebP or BMP")
    predict.option("--run=DIR", "folder of a run or of a deployment", type=path)
    predict.option("--model=FILE", "or an exported file, NAME.onnx or NAME.stablehlo", type=path)
    predict.option("--out=FILE", "of a detector: the picture (IMAGE with the ending -detected.png)")
    predict.option(
        "--threshold=X",
        "of a detector: least score of what is drawn (0.4), from detect.score_threshold of the config to 1",
        type=float,
    )

    deploy = add("deploy", commands.deploy)
    deploy.option("--run=DIR", "folder of the run", type=path, required=True)
    deploy.option("--out=DIR", "folder of the deployment; new or empty", type=path, required=True)
    deploy.checkpoint_options()

    export = add("export", commands.export)
    export.option("--run=DIR", "folder of a run or of a deployment", type=path, required=True)
    export.option("--format=FORMAT", "stablehlo, onnx or onnx-int8", type=path, required=True)
    export.option("--out=FILE", "NAME.stablehlo or NAME.onnx; it must not exist", type=path, required=True)
    export.option(
        "--layout=ORDER", "NHWC (default of stablehlo) or NCHW (of onnx): order of the input's axes"
    )
    export.checkpoint_options()
    export.option(
        "--preprocess=DTYPE",
        "the file takes pixel values from 0 to 255, uint8 (without DTYPE) or float32, and normalises them",
        nargs="?",
        const="uint8",
    )
    export.option(
        "--decode",
        "of a detector in stablehlo: the file gives detections, after non-maximum suppression",
        action="store_true",
    )
    export.option(
        "--weights=RANGE",
        "of onnx-int8: reduced (-63 to 63, the default: right on every x86 processor) or full (-127 to 127)",
    )

    quantize = add("quantize", commands.quantize)
    quantize.takes_config = True
    quantize.option("--run=DIR", "folder of a run or of a deployment", type=path, required=True)
    quantize.option("--out=DIR", "folder of the quantized network; new or empty", type=path, required=True)
    quantize.option("--bits=N", "of inputs, and of kernels without --weight_bits: 2 to 8 (8)", type=int)
    quantize.option("--weight_bits=N", "of the kernels", type=int)
    quantize.option("--per=WHAT", "a kernel has a scale for each channel, or one for the tensor (channel)")
    quantize.option(
        "--weights=RANGE", "whole numbers of 8-bit kernels: reduced, to 63, or full, to 127 (reduced)"
    )
    quantize.option("--calibration=HOW", "ranges by abs-max, percentile, entropy or mse (percentile)")
    quantize.option("--percentile=X", "of the calibration of this name (99.99)", type=float)
    quantize.option("--images=N", "training images that ranges are found on (512)", type=positive)
    quantize.option(
        "--keep-float=N",
        "how many of the most sensitive layers stay in floating point (0)",
        type=whole,
        default=0,
    )
    quantize.option("--sensitivity", "also measure what each layer alone costs", action="store_true")
    quantize.option("--qat", "train on with quantization", action="store_true")
    quantize.option("--epochs=N", "of that training (half of the run's)", type=positive)
    quantize.checkpoint_options()

    verify = add("verify", commands.verify)
    verify.config_options()
    verify.option(
        "--check=FILE.py",
        "in place of --config, your own network, loss and optimizers: a Python file whose get_check() "
        "returns a repopt_jax.verify.Check; examples/verify_own_model.py is one",
    )
    verify.option("--steps=N", "steps of training (10; with --check, all of its batches)", type=positive)
    verify.option(
        "--tolerance=X", "largest relative difference that counts as equal (1e-10)", type=above_zero
    )
    verify.option("--layers=N", "how many of the worst layers are listed (5), or all", type=count, default=5)

    convert = add("convert", commands.convert, computes=False)
    convert.add_argument(
        "source", metavar="IN", type=path, help=".pth, .pt or .safetensors: a file; else a folder"
    )
    convert.add_argument("target", metavar="OUT", type=path, help="likewise; it must not exist")
    convert.option(
        "--model=NAME",
        "of a file: repopt-vgg-B1, repvgg-A0, mobileone-s0, repghost-0.5, repmlpnet-t224 ...",
        default="",
    )
    convert.option("--classes=N", "number of classes that a file must have (any)", type=int, default=0)
    convert.option("--key=ENTRY", "of a checkpoint: the entry with the weights, if it is unusual", default="")
    convert.option(
        "--to=NAMES",
        "names in OUT: repopt, repvgg, mobileone, repghost, repmlp, timm (those of the network's authors); "
        "or scales: of a file, only its scales",
        default="",
    )

    bench = add("bench", commands.bench)
    bench.add_argument("parts", metavar="PARTS", type=words, help="what is measured, as above")
    bench.option("--model=NAME", "a classifier of this library (repopt-vgg-b1)")
    bench.option("--size=N", "side of the images in pixels (224)", type=int)
    bench.option("--batch=N,...", "images in a batch (32); each is measured", type=integers, dest="batches")
    bench.option(
        "--dtype=NAME,...", "float32 or bfloat16 (float32); each is measured", type=words, dest="dtypes"
    )
    bench.option("--rounds=N", "measurements of each candidate (15), at least 3", type=int)
    bench.option("--classes=N", "of the classifier (1000)", type=int)
    bench.option(
        "--networks=NAME,...",
        "of step, torch and so on: plain, repopt, search, repvgg (these four), "
        "xla (plain, XLA's convolutions)",
        type=words,
    )
    bench.option("--memory=GB", "limit for the largest batch (what the device has)", type=float)
    bench.option("--tf32=no", "no TF32 for float32, in JAX and in PyTorch (yes)", choices=("yes", "no"))
    bench.option("--images=DIR", "folder of images for input (generated photographs)")
    bench.option(
        "--out=PATH",
        "writes PATH.json, PATH.md and PATH.png; results in PATH.json that are not measured again are kept",
    )
    return program, added.choices


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError` and knows the names of its options."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.options = ["-h", "--help"]
        self.takes_config = False
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **kwargs)

    def option(self, spelling: str, description: str, **kwargs: Any) -> None:
        """Adds the option that is spelled `--name=METAVAR`, with the keywords of `add_argument`."""
        name, _, metavar = spelling.partition("=")
        self.options.append(name)
        value = {"metavar": metavar} if metavar else {}  # a switch has none
        self.add_argument(name, help=description, **value, **kwargs)

    def config_options(self, **kwargs: Any) -> None:
        self.takes_config = True
        self.option(
            "--config=FILE[:ARG]",
            "a Python file with get_config(arg), or the name of a shipped one, such as digits; "
            "--config.FIELD=VALUE sets one of its fields, such as --config.optim.learning_rate=0.05",
            **kwargs,
        )

    def comparison_options(self) -> None:
        self.option("--results=PATH", "also writes PATH.md, PATH.json and PATH.png", default="")
        self.option("--named=TEXT", "what the report calls the command (as it was typed)", default="")
        self.option(
            "--seeds=N", "trainings in each way (as the config says; else 2, of a detector 1)", type=positive
        )
        self.option(
            "--workers=N",
            "processes that train side by side, each on its share of the cores (on a CPU one for each core, "
            "at most 8); 0 for this process alone (the default elsewhere)",
            type=whole,
        )

    def checkpoint_options(self) -> None:
        self.option("--checkpoint=WHICH", "of a run: latest (the default), best, or the number of a step")
        self.option("--data_dir=DIR", "folder of the images, if not the one that the run used")

    def check_options(self, arguments: Sequence[str]) -> None:
        """Raises UsageError for unknown and repeated options.

        argparse would report missing options first, and use the last of repeated ones.
        """
        seen = set()
        for argument in arguments:
            name = argument.partition("=")[0]
            if not name.startswith("--") or (self.takes_config and name.startswith("--config.")):
                continue
            if name not in self.options:
                known = self.options[1:]
                raise UsageError(
                    f"unknown option {name}{did_you_mean(name, known)}; known are {', '.join(known)}"
                )
            if name in seen:
                raise UsageError(f"option {name} is given twice")
            seen.add(name)

    def error(self, message: str):
        raise UsageError(f"{message}; see --help")


# Types of options, by the names that argparse's messages use.


def path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")
    return value


def whole(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def count(text: str) -> int | None:
    return None if text == "all" else positive(text)
