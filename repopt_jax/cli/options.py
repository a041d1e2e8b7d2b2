"""The commands of the program by name, and the options of each."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from repopt_jax._version import __version__
from repopt_jax.cli import commands, completion
from repopt_jax.cli.parser import Parser, above_zero, count, integers, path, positive, whole, words

SCALE_BITS = "{}significant bits of scales (all); with 4 every runtime computes the same"


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of the program, and those of its commands by name.

    The docstring of a command's function is its description.
    """
    program = Parser(
        "repopt",
        description="Gradient and structural re-parameterization for JAX.",
        epilog="`repopt COMMAND --help` describes a command and its options.",
    )
    program.add_argument("--version", action="version", version=__version__)
    program.options.append("--version")
    added = program.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        description = inspect.getdoc(command.run) or ""
        summary = description.partition("\n")[0].rstrip(".")
        parser = added.add_parser(name, description=description, help=summary)
        parser.set_defaults(command=command.run, computes=command.computes)
        command.options(parser)
    return program, added.choices


def _quickstart(parser: Parser) -> None:
    parser.option("--out=DIR", "folder of all results (%(default)s)", type=path, default="runs/quickstart")
    parser.comparison_options()
    parser.config_options(default="deep_digits")
    parser.set_defaults(ways=None)


def _compare(parser: Parser) -> None:
    parser.option(
        "--out=DIR",
        "folder of the comparison. Run again, the command continues it, or makes its report anew",
        type=path,
        required=True,
    )
    parser.comparison_options()
    parser.option(
        "--ways=WAY,...", "these ways alone (all); `repopt join` joins them with others", type=words
    )
    parser.config_options(required=True)


def _join(parser: Parser) -> None:
    parser.argument("RESULTS", "PATH.json of a comparison", type=path, nargs="+", dest="files")
    parser.option("--results=PATH", "writes PATH.md, PATH.json and PATH.png", required=True)


def _training(parser: Parser) -> None:
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


def _check_data(parser: Parser) -> None:
    parser.config_options(required=True)


def _prune(parser: Parser) -> None:
    parser.takes_config = True
    parser.option("--run=DIR", "folder of the run, of mode plain or repopt", type=path, required=True)
    parser.option(
        "--target=X", "share of the multiply-accumulates that is to stay (0.5)", type=float, default=0.5
    )
    parser.option(
        "--out=DIR",
        "folder of the pruning. Run again, the command continues it, or reports what is there",
        type=path,
        required=True,
    )
    parser.option(
        "--checkpoint=WHICH",
        "of the run: latest (the default), best, or the number of a step",
        values=("latest", "best"),
    )
    parser.printing_option()


def _evaluate(parser: Parser) -> None:
    parser.option("--run=DIR", "folder of a run or of a deployment", type=path)
    parser.option("--model=FILE", "exported file, NAME.onnx or NAME.stablehlo", type=path)
    parser.checkpoint_options()


def _predict(parser: Parser) -> None:
    parser.argument("IMAGE", "PNG, JPEG, WebP or BMP", type=path)
    parser.option("--run=DIR", "folder of a run or of a deployment", type=path)
    parser.option("--model=FILE", "or an exported file, NAME.onnx or NAME.stablehlo", type=path)
    parser.option("--out=FILE", "of a detector: the picture (IMAGE with the ending -detected.png)")
    parser.option(
        "--threshold=X",
        "of a detector: least score of what is drawn (0.4), from detect.score_threshold of the config to 1",
        type=float,
    )


def _deploy(parser: Parser) -> None:
    parser.option("--run=DIR", "folder of the run", type=path, required=True)
    parser.option("--out=DIR", "folder of the deployment; new or empty", type=path, required=True)
    parser.checkpoint_options()


def _export(parser: Parser) -> None:
    parser.option("--run=DIR", "folder of a run or of a deployment", type=path, required=True)
    parser.option(
        "--format=FORMAT",
        "stablehlo, onnx or onnx-int8",
        type=path,
        required=True,
        values=("stablehlo", "onnx", "onnx-int8"),
    )
    parser.option("--out=FILE", "NAME.stablehlo or NAME.onnx; it must not exist", type=path, required=True)
    parser.option(
        "--layout=ORDER",
        "NHWC (default of stablehlo) or NCHW (of onnx): order of the input's axes",
        values=("NHWC", "NCHW"),
    )
    parser.checkpoint_options()
    parser.option(
        "--preprocess=DTYPE",
        "the file takes pixel values from 0 to 255, uint8 (without DTYPE) or float32, and normalises them",
        nargs="?",
        const="uint8",
        values=("uint8", "float32"),
    )
    parser.option(
        "--decode",
        "of a detector in stablehlo: the file gives detections, after non-maximum suppression",
        action="store_true",
    )
    parser.option(
        "--weights=RANGE",
        "of onnx-int8: reduced (-63 to 63, the default: right on every x86 processor) or full (-127 to 127)",
        values=("reduced", "full"),
    )
    parser.option("--scale-bits=N", SCALE_BITS.format("of onnx-int8: "), type=int)


def _quantize(parser: Parser) -> None:
    parser.takes_config = True
    parser.option("--run=DIR", "folder of a run or of a deployment", type=path, required=True)
    parser.option("--out=DIR", "folder of the quantized network; new or empty", type=path, required=True)
    parser.option("--bits=N", "of inputs, and of kernels without --weight-bits: 2 to 8 (8)", type=int)
    parser.option("--weight-bits=N", "of the kernels", type=int)
    parser.option(
        "--per=WHAT",
        "a kernel has a scale for each channel, or one for the tensor (channel)",
        values=("channel", "tensor"),
    )
    parser.option(
        "--weights=RANGE",
        "whole numbers of 8-bit kernels: reduced, to 63, or full, to 127 (reduced)",
        values=("reduced", "full"),
    )
    parser.option("--scale-bits=N", SCALE_BITS.format(""), type=int)
    parser.option(
        "--calibration=HOW",
        "ranges by abs-max, percentile, entropy or mse (percentile)",
        values=("abs-max", "percentile", "entropy", "mse"),
    )
    parser.option("--percentile=X", "of the calibration of this name (99.99)", type=float)
    parser.option("--images=N", "training images that ranges are found on (512)", type=positive)
    parser.option(
        "--keep-float=N",
        "how many of the most sensitive layers stay in floating point (0)",
        type=whole,
        default=0,
    )
    parser.option("--sensitivity", "also measure what each layer alone costs", action="store_true")
    parser.option("--qat", "train on with quantization", action="store_true")
    parser.option("--epochs=N", "of that training (half of the run's)", type=positive)
    parser.checkpoint_options()


def _verify(parser: Parser) -> None:
    parser.config_options()
    parser.option(
        "--check=FILE.py",
        "in place of --config, your own network, loss and optimizers: a Python file whose get_check() "
        "returns a repopt_jax.verify.Check; examples/verify_own_model.py is one",
    )
    parser.option("--steps=N", "steps of training (10; with --check, all of its batches)", type=positive)
    parser.option(
        "--tolerance=X", "largest relative difference that counts as equal (1e-10)", type=above_zero
    )
    parser.option("--layers=N", "how many of the worst layers are listed (5), or all", type=count, default=5)


def _convert(parser: Parser) -> None:
    parser.argument("IN", ".pth, .pt or .safetensors: a file; else a folder", type=path, dest="source")
    parser.argument("OUT", "likewise; it must not exist", type=path, dest="target")
    parser.option(
        "--model=NAME",
        "of a file: repopt-vgg-B1, repvgg-A0, mobileone-s0, repghost-0.5, repmlpnet-t224 ...",
        default="",
        values=completion.names_of_networks,
    )
    parser.option("--classes=N", "number of classes that a file must have (any)", type=int, default=0)
    parser.option("--key=ENTRY", "of a checkpoint: the entry with the weights, if it is unusual", default="")
    parser.option(
        "--to=NAMES",
        "names in OUT: repopt, repvgg, mobileone, repghost, repmlp, timm (those of the network's authors); "
        "or scales: of a file, only its scales",
        default="",
        values=("repopt", "repvgg", "mobileone", "repghost", "repmlp", "timm", "scales"),
    )


def _models(parser: Parser) -> None:
    parser.argument(
        "PATTERN",
        "a part of the names, or the whole with * and ?",
        nargs="?",
        values=completion.names_of_networks,
    )
    parser.option("--json", "prints the list for programs, with all of its fields", action="store_true")


def _bench(parser: Parser) -> None:
    parser.argument(
        "PARTS",
        "what is measured, as above",
        type=words,
        values=(
            *("update", "optimizers", "step", "largest", "inference", "torch", "conv", "compile", "input"),
            "all",
        ),
    )
    parser.option(
        "--model=NAME",
        "a classifier of this library (repopt-vgg-b1)",
        values=completion.names_of_classifiers,
    )
    parser.option("--size=N", "side of the images in pixels (224)", type=int)
    parser.option("--batch=N,...", "images in a batch (32); each is measured", type=integers, dest="batches")
    parser.option(
        "--dtype=NAME,...",
        "float32 or bfloat16 (float32); each is measured",
        type=words,
        dest="dtypes",
        values=("float32", "bfloat16"),
    )
    parser.option("--rounds=N", "measurements of each candidate (15), at least 3", type=int)
    parser.option("--classes=N", "of the classifier (1000)", type=int)
    parser.option(
        "--networks=NAME,...",
        "of step, torch and so on: plain, repopt, search, repvgg (these four), orepa, "
        "xla (plain, XLA's convolutions)",
        type=words,
        values=("plain", "repopt", "search", "orepa", "repvgg", "xla"),
    )
    parser.option("--memory=GB", "limit for the largest batch (what the device has)", type=float)
    parser.option(
        "--tf32=no",
        "no TF32 for float32, in JAX and in PyTorch (yes)",
        choices=("yes", "no"),
        values=("yes", "no"),
    )
    parser.option("--images=DIR", "folder of images for input (generated photographs)")
    parser.option(
        "--out=PATH",
        "writes PATH.json, PATH.md and PATH.png; results in PATH.json that are not measured again are kept",
    )


def _completion(parser: Parser) -> None:
    parser.argument("SHELL", "bash, zsh or fish", choices=completion.SHELLS, values=completion.SHELLS)


class Command(NamedTuple):
    """A command: the function that carries it out, the one that adds its options, and whether it computes
    anything for long."""

    run: Callable[[Any], int]
    options: Callable[[Parser], None]
    computes: bool = True


# In the order of the help.
COMMANDS = {
    "quickstart": Command(commands.quickstart, _quickstart),
    "compare": Command(commands.compare, _compare),
    "join": Command(commands.join, _join, computes=False),
    "search": Command(commands.search, _training),
    "train": Command(commands.train, _training),
    "check-data": Command(commands.check_data, _check_data),
    "prune": Command(commands.prune, _prune),
    "eval": Command(commands.evaluate, _evaluate),
    "predict": Command(commands.predict, _predict),
    "deploy": Command(commands.deploy, _deploy),
    "export": Command(commands.export, _export),
    "quantize": Command(commands.quantize, _quantize),
    "verify": Command(commands.verify, _verify),
    "convert": Command(commands.convert, _convert, computes=False),
    "models": Command(commands.models, _models, computes=False),
    "bench": Command(commands.bench, _bench),
    "completion": Command(commands.completion, _completion, computes=False),
}
