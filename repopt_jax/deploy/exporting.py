"""From a run or a deployment to a file that runs elsewhere, and the measurement of such a file."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from repopt_jax import extras
from repopt_jax.arguments import check_kind, check_path
from repopt_jax.deploy.evaluation import COMPARED_IMAGES, open_test_of, training_images
from repopt_jax.deploy.network import load_plain, read_settings
from repopt_jax.export.function import file_function
from repopt_jax.export.metadata import LAYOUTS, Metadata
from repopt_jax.export.onnx import FusedDifference, compare_fused, to_onnx
from repopt_jax.export.runtime import (
    ONNX,
    STABLEHLO,
    FileNetwork,
    Port,
    count_operations,
    open_file,
    open_onnx,
    open_stablehlo,
)
from repopt_jax.export.stablehlo import to_stablehlo
from repopt_jax.interop.convert import refuse_existing
from repopt_jax.quantize import Scheme, quantize, quantizers, with_integer_biases, without_quantizers
from repopt_jax.surgery.fuse import OutputDifference, difference_of
from repopt_jax.surgery.modules import named_modules
from repopt_jax.train.build import Trained, make_task
from repopt_jax.train.config import Config, DataConfig
from repopt_jax.train.rundir import PART
from repopt_jax.train.tasks import Task


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of files: its ending, the packages that write and run it, the layout by default, and what
    writes and opens a file."""

    suffix: str
    packages: tuple[str, ...]
    layout: str
    write: Callable[[nnx.Module, Path, Metadata], None]
    open: Callable[[Path], FileNetwork]


INT8 = "onnx-int8"
FORMATS = {
    "stablehlo": Format(STABLEHLO, ("flatbuffers",), "NHWC", to_stablehlo, open_stablehlo),
    "onnx": Format(ONNX, ("onnx", "onnxruntime"), "NCHW", to_onnx, open_onnx),
    INT8: Format(ONNX, ("onnx", "onnxruntime"), "NCHW", to_onnx, open_onnx),
}
PREPROCESS = ("uint8", "float32")
WEIGHTS = ("reduced", "full")
CALIBRATION_IMAGES = 512


@dataclasses.dataclass(frozen=True)
class Exported:
    """What exporting a network came to.

    Attributes:
      path, size: of the file; bytes.
      inputs, outputs: of its function.
      metadata: what the file says.
      difference: between the outputs of the file, as it is run here, and of the network that it holds: of
        INT8 the quantized one.
      ms: for one image, median; of this processor and of this moment.
      operations: of the program in the file, name -> number.
      int8: what quantization changed; None for the other formats.
    """

    path: Path
    size: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    metadata: Metadata
    difference: OutputDifference
    ms: float
    operations: dict[str, int]
    int8: "Int8 | None" = None


@dataclasses.dataclass(frozen=True)
class Int8:
    """An INT8 file beside the float32 file of the same network, both as onnxruntime runs them here.

    Attributes:
      images: training images that the ranges were found on; 0 where the network was quantized before.
      kept: paths of the layers that stay in floating point.
      size: of the float32 file, bytes.
      test, float_test: the numbers of the task over the test images, INT8 and float32.
      difference: of the outputs of the INT8 file from those of the float32 file.
      fused: of the outputs of the INT8 file with onnxruntime's fused integer kernels from those with every
        node run as it is written, see `export.compare_fused`.
      float_ms: of the float32 file, for one image, as `Exported.ms`.
    """

    images: int
    kept: tuple[str, ...]
    size: int
    test: dict[str, Any]
    float_test: dict[str, Any]
    difference: OutputDifference
    fused: FusedDifference
    float_ms: float


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    format: str,
    layout: str | None = None,
    checkpoint: str | int | None = None,
    data_dir: str | None = None,
    preprocess: str = "",
    decode: bool = False,
    weights: str | None = None,
    scale_bits: int | None = None,
    keep_float: Iterable[str] | None = None,
) -> Exported:
    """Writes the network of a run or deployment to a file, and compares what the file computes with it.

    Args:
      run_dir: a run, which is fused, or a deployment.
      out: the file, which must not exist, with the ending of the format.
      format: a key of `FORMATS`.
      layout: of the input, "NHWC" or "NCHW"; by default that of the format.
      checkpoint: of a run, as `deploy.load_any` takes it.
      data_dir: where the images are now, if not where the run found them.
      preprocess: "uint8" or "float32" for a file that takes pixel values from 0 to 255 of this dtype; "" for
        one that takes normalised images.
      decode: of a detector, in StableHLO: the file gives detections in place of raw outputs.
      weights: of onnx-int8, the range of whole numbers of weights: "reduced", -63 to 63, the default, or
        "full", -127 to 127, see `quantize.Scheme`.
      scale_bits: of onnx-int8, significant binary digits of every scale, see `quantize.Scheme`; None for all.
      keep_float: of onnx-int8, paths of the layers that stay in floating point; by default the last ones of
        a detector (`FCOS.predictions`), and none of a classifier.

    INT8 quantizes the network by `quantize.quantize` with `CALIBRATION_IMAGES` training images. A network
    that `repopt quantize` wrote is exported as it is.

    Raises:
      FileNotFoundError: no run or deployment, or no such checkpoint.
      FileExistsError: there is a file at `out`.
      ValueError: options that do not fit together or the network.
      ModuleNotFoundError: a package that writes or runs the format is not installed.
      OSError: the file cannot be written.
    """
    check_path("run_dir", run_dir)
    check_path("out", out)
    check_kind("format", format, str, "the name of a format")
    out = Path(out).expanduser()
    _check(out, format, layout, preprocess, decode, weights, scale_bits, keep_float)
    trained, images = load_plain(run_dir, checkpoint=checkpoint), 0
    if decode and trained.config.task != "detect":
        raise ValueError(f"`decode` is for a detector, and {run_dir} holds a classifier: leave it out")
    if format == INT8:
        if quantizers(trained.model):
            if (weights, scale_bits, keep_float) != (None, None, None):
                raise ValueError(
                    f"{run_dir} holds a network that is quantized already: leave `weights`, `scale_bits` and "
                    "`keep_float` out, or give the run that it was made from"
                )
            plain = trained._replace(model=without_quantizers(trained.model))
        else:
            plain, calibration = trained, training_images(trained, CALIBRATION_IMAGES, data_dir=data_dir)
            kept = getattr(plain.model, "predictions", ()) if keep_float is None else keep_float
            options = {"weight_range": weights or "reduced", "scale_bits": scale_bits, "keep_float": kept}
            trained = plain._replace(model=quantize(plain.model, calibration, **options))
            images = len(calibration)
        # Those that onnxruntime's integer kernels make of them anyhow.
        trained = trained._replace(model=with_integer_biases(trained.model))
    metadata = metadata_of(
        trained, layout=layout or FORMATS[format].layout, input=preprocess or "normalised", decoded=decode
    )
    with _written(format, trained, metadata, out) as file:
        difference = compare(trained, file, data_dir=data_dir)
        int8 = None
        if format == INT8:
            beside = out.with_name(f"{out.name}.float32")
            with _written("onnx", plain, metadata, beside, keep=False) as other:
                int8 = _beside(trained, file, other, images, data_dir)
        size, ms = file.path.stat().st_size, latency(file)
    operations = count_operations(out)
    return Exported(out, size, file.inputs, file.outputs, metadata, difference, ms, operations, int8)


@contextlib.contextmanager
def _written(
    format: str, trained: Trained, metadata: Metadata, out: Path, *, keep: bool = True
) -> Iterator[FileNetwork]:
    """Writes a file beside its place and opens it; the file is moved to its place if all goes well."""
    part = out.with_name(out.name + PART)
    try:
        FORMATS[format].write(trained.model, part, metadata)
        yield FORMATS[format].open(part)
        if keep:
            part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _beside(
    trained: Trained, file: FileNetwork, other: FileNetwork, images: int, data_dir: str | None
) -> Int8:
    quantized = quantizers(trained.model)
    layers = [p for p, m in named_modules(trained.model) if isinstance(m, (nnx.Conv, nnx.Linear))]
    shown = _first(trained.config, file.metadata, data_dir)
    return Int8(
        images=images,
        kept=tuple(path for path in layers if path not in quantized),
        size=other.path.stat().st_size,
        test=measure(file, trained.config, data_dir=data_dir),
        float_test=measure(other, trained.config, data_dir=data_dir),
        difference=difference_of_files(other, file, trained.config, data_dir=data_dir),
        fused=compare_fused(file.path, np.concatenate([*shown])),
        float_ms=latency(other),
    )


def metadata_of(trained: Trained, **changes: Any) -> Metadata:
    """What a file says of a network; `changes` are fields of `Metadata` that depend on the file."""
    config, info = trained.config, trained.info
    detector: dict[str, Any] = {}
    if config.task == "detect":
        detector = {
            "keypoint_names": info.keypoint_names,
            "strides": trained.model.variant.strides,
            "score_threshold": config.detect.score_threshold,
            "iou_threshold": config.detect.iou_threshold,
            "max_detections": config.detect.max_detections,
        }
    return Metadata(
        task=config.task,
        name=config.name,
        architecture=make_task(config).architecture(),
        class_names=info.class_names,
        image_size=config.data.image_size,
        channels=info.channels,
        resize=config.data.resize,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        **detector,
        **changes,
    )


# -- measuring files


def compare(trained: Trained, file: FileNetwork, *, data_dir: str | None = None) -> OutputDifference:
    """The difference between the outputs of a network and of a file made of it, on the first test images.

    Images go through the preprocessing of the file on one side and of the training on the other. Of a file
    that decodes, `agreement` is the share of the detections of the same class, and the other numbers are
    over those.
    """
    own = dataclasses.replace(file.metadata, input="normalised", layout="NHWC")
    network = jax.jit(file_function(trained.model, own))
    expected = _first_outputs(network, trained.config, own, data_dir)
    found = _first_outputs(file, trained.config, file.metadata, data_dir)
    if not file.metadata.decoded:
        return _difference(expected, found)
    same = expected["classes"] == found["classes"]
    names = [name for name in expected if name != "classes"]
    difference = difference_of(*([side[name][same] for name in names] for side in (expected, found)))
    return dataclasses.replace(difference, agreement=float(same.mean()), count=len(same))


def difference_of_files(
    one: FileNetwork, other: FileNetwork, config: Config, *, data_dir: str | None = None
) -> OutputDifference:
    """The difference between the raw outputs of two files on the first test images that a config names."""
    outputs, others = (_first_outputs(file, config, file.metadata, data_dir) for file in (one, other))
    return _difference(outputs, others)


def _difference(outputs: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> OutputDifference:
    names = sorted(outputs, key=lambda name: name != "classes")  # the logits first
    return difference_of(*([side[name] for name in names] for side in (outputs, others)))


def latency(file: FileNetwork, *, runs: int = 30) -> float:
    """Milliseconds for one image, the median of `runs` after three that do not count."""
    data = file.metadata
    image = np.zeros((1, data.image_size, data.image_size, data.channels), data.dtype)
    seconds = []
    for _ in range(3 + runs):
        start = time.perf_counter()
        file(image)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[3:])


def evaluate_file(
    path: str | Path, *, run_dir: str | Path | None = None, data_dir: str | None = None
) -> tuple[Metadata, dict[str, Any]]:
    """The numbers of the task over test images, each counted once, of an exported file as it is run here.

    Images are preprocessed as the file says.

    Args:
      path: the file.
      run_dir: a run or deployment on whose test images the file is measured.
      data_dir: the folder of the images; without `run_dir` one that holds `train/<class>/*` and
        `test/<class>/*` or, for a detector, COCO's annotations.

    Returns:
      What the file says, and the numbers, as `deploy.evaluate` gives them.

    Raises:
      FileNotFoundError: no file, run or images.
      ValueError: a file that is none of ours or damaged, neither `run_dir` nor `data_dir`, or data of other
        classes.
      ModuleNotFoundError: what runs the file is not installed.
    """
    check_path("path", path)
    file = open_file(path)
    data = file.metadata
    if run_dir is not None:
        config, _ = read_settings(run_dir)
    elif data_dir is None:
        raise ValueError(
            f"{path} holds no images: give `data_dir`, their folder, or `run_dir`, a run that was trained on "
            "them"
        )
    else:
        source = {"classify": "folder", "detect": "coco"}.get(data.task, "")
        images = DataConfig(source=source, data_dir=data_dir, image_size=data.image_size)
        config = Config(name=data.name, task=data.task, data=images)
    if config.task != data.task:
        raise ValueError(f"{path} is for the task {data.task!r}, and {run_dir} for {config.task!r}")
    return data, measure(file, config, data_dir=data_dir)


def measure(file: FileNetwork, config: Config, *, data_dir: str | None = None) -> dict[str, Any]:
    """The numbers of the task over the test images that a config names, preprocessed as the file says.

    Raises:
      FileNotFoundError, ValueError: as `deploy.evaluate`.
    """
    task, source, batches = _images(config, file.metadata, data_dir)
    return task.measure(file.detect if file.metadata.task == "detect" else file.logits, source, batches)


def _first_outputs(
    network: Callable[[Any], Any], config: Config, data: Metadata, data_dir: str | None
) -> dict[str, np.ndarray]:
    """The outputs of a network by name on the first `COMPARED_IMAGES` test images, as `data` has images."""
    outputs = [
        {name: np.asarray(y) for name, y in network(images).items()}
        for images in _first(config, data, data_dir)
    ]
    return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}


def _first(config: Config, data: Metadata, data_dir: str | None) -> Iterator[np.ndarray]:
    """The first `COMPARED_IMAGES` test images that a config names, in batches, as a file takes them."""
    left = COMPARED_IMAGES
    for batch in _images(config, data, data_dir)[2]:
        images = batch["image"][batch["mask"] > 0][:left]
        yield images
        left -= len(images)
        if not left:
            break


def _images(config: Config, data: Metadata, data_dir: str | None) -> tuple[Task, Any, Any]:
    """Task, data set and batches of the test images that a config names, as a file takes them."""
    transform = data.transform()
    preprocessing = {"image_size": transform.image_size, "mean": transform.mean, "std": transform.std}
    return open_test_of(
        config, data.class_names, data.channels, data_dir, resize=data.resize, **preprocessing
    )


def _check(
    out: Path,
    format: str,
    layout: str | None,
    preprocess: str,
    decode: bool,
    weights: str | None,
    scale_bits: int | None,
    keep_float: Iterable[str] | None,
) -> None:
    """Raises what `export` raises before it loads anything."""
    if format not in FORMATS:
        raise ValueError(f"`format` is {format!r}; it must be one of {', '.join(FORMATS)}")
    suffix = FORMATS[format].suffix
    problems = (
        (out.suffix == suffix, f"`out` is {out}, and files of format {format} end in {suffix}"),
        (layout in (None, *LAYOUTS), f"`layout` is {layout!r}; it must be one of {', '.join(LAYOUTS)}"),
        (
            preprocess in ("", *PREPROCESS),
            f"`preprocess` is {preprocess!r}; it must be one of {', '.join(PREPROCESS)}, or left out",
        ),
        (
            format == "stablehlo" or not decode,
            f"`decode` is for the format stablehlo: detections of {format} are decoded by who runs the file",
        ),
        (
            weights in (None, *WEIGHTS),
            f"`weights` is {weights!r}; it must be one of {', '.join(WEIGHTS)}",
        ),
        (format == INT8 or weights is None, f"`weights` is for the format {INT8}"),
        (format == INT8 or scale_bits is None, f"`scale_bits` is for the format {INT8}"),
        (format == INT8 or keep_float is None, f"`keep_float` is for the format {INT8}"),
    )
    wrong = [message for holds, message in problems if not holds]
    try:
        Scheme(scale_bits=scale_bits)
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    refuse_existing(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} for the file {out.name}")
    extras.require(*FORMATS[format].packages, by=f"the format {format}")
