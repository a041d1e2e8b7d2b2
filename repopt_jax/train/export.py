"""From a run or a deployment to a file that runs elsewhere, and the measurement of such a file."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repopt_jax.export.checks import require
from repopt_jax.export.function import file_function
from repopt_jax.export.metadata import LAYOUTS, Metadata
from repopt_jax.export.runtime import (
    ONNX,
    STABLEHLO,
    FileNetwork,
    Port,
    open_file,
    open_onnx,
    open_stablehlo,
)
from repopt_jax.export.stablehlo import to_stablehlo
from repopt_jax.interop.convert import refuse_existing
from repopt_jax.surgery.fuse import OutputDifference, difference_of
from repopt_jax.train.build import Trained, make_task
from repopt_jax.train.config import Config, DataConfig
from repopt_jax.train.deploy import COMPARED_IMAGES, load_plain, open_test_of, read_settings
from repopt_jax.train.rundir import PART


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of files: its ending, the packages that write and run it, the layout by default, and what
    opens a file."""

    suffix: str
    packages: tuple[str, ...]
    layout: str
    open: Callable[[Path], FileNetwork]


FORMATS = {
    "stablehlo": Format(STABLEHLO, ("flatbuffers",), "NHWC", open_stablehlo),
    "onnx": Format(ONNX, ("onnx", "onnxruntime"), "NCHW", open_onnx),
    "onnx-int8": Format(ONNX, ("onnx", "onnxruntime"), "NCHW", open_onnx),
}
PREPROCESS = ("uint8", "float32")
WEIGHTS = ("reduced", "full")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What exporting a network came to.

    Attributes:
      path, size: of the file; bytes.
      inputs, outputs: of its function.
      metadata: what the file says.
      difference: between the outputs of the file, as it is run here, and of the network.
    """

    path: Path
    size: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    metadata: Metadata
    difference: OutputDifference


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

    Raises:
      FileNotFoundError: no run or deployment, or no such checkpoint.
      FileExistsError: there is a file at `out`.
      ValueError: options that do not fit together or the network.
      ModuleNotFoundError: a package that writes or runs the format is not installed.
      OSError: the file cannot be written.
    """
    out = Path(out).expanduser()
    _check(out, format, layout, preprocess, decode)
    trained = load_plain(run_dir, checkpoint=checkpoint)
    metadata = metadata_of(
        trained, layout=layout or FORMATS[format].layout, input=preprocess or "normalised", decoded=decode
    )
    part = out.with_name(out.name + PART)
    to_stablehlo(trained.model, part, metadata)
    try:
        file = FORMATS[format].open(part)
        difference = compare(trained, file, data_dir=data_dir)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return Exported(out, out.stat().st_size, file.inputs, file.outputs, metadata, difference)


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
    expected, found, count = [], [], 0
    for ours, theirs in zip(*(_batches(trained.config, data, data_dir) for data in (own, file.metadata))):
        real = ours["mask"] > 0
        expected.append({name: np.asarray(y)[real] for name, y in network(ours["image"]).items()})
        found.append({name: y[real] for name, y in file(theirs["image"]).items()})
        count += real.sum()
        if count >= COMPARED_IMAGES:
            break
    expected, found = (
        {name: np.concatenate([part[name] for part in parts])[:COMPARED_IMAGES] for name in parts[0]}
        for parts in (expected, found)
    )
    if not file.metadata.decoded:
        return difference_of([*expected.values()], [found[name] for name in expected])
    same = expected["classes"] == found["classes"]
    names = [name for name in expected if name != "classes"]
    difference = difference_of(*([side[name][same] for name in names] for side in (expected, found)))
    return dataclasses.replace(difference, agreement=float(same.mean()), count=len(same))


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
    task, source, batches = open_test_of(
        config, file.metadata.class_names, data_dir, **_preprocessing(file.metadata)
    )
    return task.measure(file.detect if file.metadata.task == "detect" else file.logits, source, batches)


def _batches(config: Config, data: Metadata, data_dir: str | None) -> Iterable[dict[str, Any]]:
    return open_test_of(config, data.class_names, data_dir, **_preprocessing(data))[2]


def _preprocessing(data: Metadata) -> dict[str, Any]:
    """The fields of `DataConfig` that give images as a file takes them."""
    transform = data.transform()
    return {
        "image_size": transform.image_size,
        "resize": data.resize,
        "mean": transform.mean,
        "std": transform.std,
    }


def _check(out: Path, format: str, layout: str | None, preprocess: str, decode: bool) -> None:
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
    )
    if wrong := [message for holds, message in problems if not holds]:
        raise ValueError("; ".join(wrong))
    refuse_existing(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} for the file {out.name}")
    for package in FORMATS[format].packages:
        require(package)
