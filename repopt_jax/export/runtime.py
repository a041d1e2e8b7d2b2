"""Running exported files: images in as they are stored, logits or detections out.

    network = open_file("network.onnx")
    image, ratio = network.prepare(pixels)  # resized and normalised as the file says
    logits = network.logits(image[None])

ONNX files are run by onnxruntime on the CPU, StableHLO files by JAX on its default backend.
"""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from repopt_jax import extras
from repopt_jax.arguments import check_path
from repopt_jax.data.detection import letterbox
from repopt_jax.data.transforms import fit, normalise
from repopt_jax.detection import Detections, Outputs
from repopt_jax.export.checksum import CHECKSUM, is_unaltered
from repopt_jax.export.function import decoded
from repopt_jax.export.metadata import Metadata
from repopt_jax.export.stablehlo import SUFFIX as STABLEHLO
from repopt_jax.export.stablehlo import operations_of, read_stablehlo

ONNX = ".onnx"


def count_operations(path: str | Path) -> dict[str, int]:
    """The operations that a file's program runs, by name, the most frequent first. Of a loop one round is
    counted, and of alternatives for platforms the CPU's.

    Raises:
      OSError, ValueError: as `open_file`.
      ModuleNotFoundError: onnx, or flatbuffers, is not installed.
    """
    check_path("path", path)
    path = Path(path).expanduser()
    if path.suffix == STABLEHLO:
        found = operations_of(read_stablehlo(path).exported)
    else:
        extras.require("onnx", by="reading an ONNX file")
        import onnx

        content = path.read_bytes()
        try:
            found = [node.op_type for node in onnx.load_model_from_string(content).graph.node]
        except Exception as error:  # of protocol buffers, whose classes differ between their versions
            raise ValueError(f"{path} is no ONNX file, or a damaged one: {error}") from error
    return dict(collections.Counter(found).most_common())


class Port(NamedTuple):
    """An input or output of a file: its name, dtype, and shape; sizes that may vary are text."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"


class FileNetwork:
    """A network in a file.

    Attributes:
      path: of the file.
      metadata: what the file says.
      inputs, outputs: of its function.
    """

    def __init__(
        self,
        path: str | Path,
        metadata: Metadata,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        run: Callable[[np.ndarray], Mapping[str, Any]],
    ):
        self.path: Path = Path(path)
        self.metadata = metadata
        self.inputs: tuple[Port, ...] = tuple(inputs)
        self.outputs: tuple[Port, ...] = tuple(outputs)
        self._run = run

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the file's function.

        Args:
          images: (batch, image_size, image_size, channels), as `prepare` makes each of them. They are
            brought into the file's layout; for a file that takes uint8, float pixel values are rounded.

        Returns:
          Name -> output, (batch, ...).

        Raises:
          ValueError: images of another shape.
          TypeError: images that are no numbers; whole numbers where the file takes normalised images.
        """
        images, data = np.asarray(images), self.metadata
        if not (np.issubdtype(images.dtype, np.number) or images.dtype.name == "bfloat16"):
            raise TypeError(f"`images` is of dtype {images.dtype}; {self.path} takes numbers")
        if data.input == "normalised" and np.issubdtype(images.dtype, np.integer):
            raise TypeError(
                f"`images` is of dtype {images.dtype}, as pixel values are; {self.path} takes "
                f"{data.describe_input()}: `prepare` makes such an image of pixels"
            )
        wanted = (data.image_size, data.image_size, data.channels)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise ValueError(
                f"`images` is {images.shape}; {self.path} takes (batch, {', '.join(map(str, wanted))})"
            )
        if data.dtype == "uint8" and images.dtype != np.uint8:
            images = np.clip(np.rint(images), 0, 255)
        images = images.astype(data.dtype)
        if data.layout == "NCHW":
            images = np.ascontiguousarray(np.moveaxis(images, -1, 1))
        return {name: np.asarray(output) for name, output in self._run(images).items()}

    def prepare(self, pixels: np.ndarray) -> tuple[np.ndarray, float]:
        """Preprocesses an image as the file takes it; see `prepare`."""
        return prepare(pixels, self.metadata)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(batch, classes) of a classifier; images as for `__call__`.

        Raises:
          ValueError: not a classifier, or images of another shape.
        """
        self._check_task("classify", "classifier")
        return next(iter(self(images).values()))

    def detect(self, images: np.ndarray) -> Detections:
        """Detections of a detector as NumPy arrays, in pixels of its input; images as for `__call__`.

        Where the file gives raw outputs, they are decoded here, by the same function as in training.

        Raises:
          ValueError: not a detector, or images of another shape.
        """
        self._check_task("detect", "detector")
        outputs = self(images)
        if self.metadata.decoded:
            return Detections(**outputs)
        return jax.device_get(self._decode(Outputs(**outputs)))

    @functools.cached_property
    def _decode(self) -> Callable[[Outputs], Detections]:
        return jax.jit(lambda outputs: decoded(outputs, self.metadata))

    def _check_task(self, task: str, noun: str) -> None:
        if self.metadata.task != task:
            raise ValueError(f"{self.path} is no {noun}: its task is {self.metadata.task or 'not known'!r}")


def prepare(pixels: np.ndarray, metadata: Metadata) -> tuple[np.ndarray, float]:
    """Preprocesses an image as a network takes it.

    Args:
      pixels: uint8 (height, width, channels), of any size.
      metadata: of the network.

    Returns:
      The image (image_size, image_size, channels) of `metadata.dtype`: of a detector letterboxed, else
      resized and cut out of the centre. Pixels of it for a pixel of the original, the same in both
      directions.

    Raises:
      TypeError: pixels of another dtype.
      ValueError: no image, or one of other channels.
    """
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        given = getattr(pixels, "dtype", type(pixels).__name__)
        raise TypeError(f"`pixels` is of {given}: it must be a NumPy array of uint8, values from 0 to 255")
    if pixels.ndim != 3 or pixels.shape[-1] != metadata.channels or not pixels.size:
        raise ValueError(
            f"`pixels` is {pixels.shape}: the file takes (height, width, {metadata.channels}) of any height "
            "and width; repeat the channel of a grey image, or leave out that of transparency"
        )
    size = metadata.image_size
    if metadata.task == "detect":
        fitted, ratio = letterbox(pixels, size)
    else:
        fitted = fit(pixels, size, metadata.resize)
        ratio = (metadata.resize or size) / min(pixels.shape[:2])
    if metadata.input == "normalised":
        return normalise(fitted[None], metadata.pixels)[0], ratio
    return fitted.astype(metadata.dtype), ratio


def open_file(path: str | Path) -> FileNetwork:
    """Opens an exported file, NAME.onnx or NAME.stablehlo.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another ending, a file without this library's metadata, or a damaged one.
      ModuleNotFoundError: onnxruntime, or flatbuffers for StableHLO, is not installed.
    """
    check_path("path", path)
    path = Path(path).expanduser()
    open_it = {ONNX: open_onnx, STABLEHLO: open_stablehlo}.get(path.suffix)
    if open_it is None:
        raise ValueError(f"{path} does not end in {ONNX} or {STABLEHLO}, the endings of exported files")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return open_it(path)


def open_stablehlo(path: str | Path) -> FileNetwork:
    """Opens a file of `to_stablehlo`; raises as `open_file`, also where JAX's backend is none of its own."""
    exported, metadata = read_stablehlo(path)
    if (backend := jax.default_backend()) not in exported.platforms and backend != "gpu":
        raise ValueError(f"{path} runs on {', '.join(exported.platforms)}, and JAX uses {backend} here")
    names = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    inputs = [_port("images", aval) for aval in exported.in_avals]
    outputs = [_port(name, aval) for name, aval in names.items()]
    return FileNetwork(path, metadata, inputs, outputs, jax.jit(exported.call))


def open_onnx(path: str | Path, *, optimized: bool = True) -> FileNetwork:
    """Opens an ONNX file of this library in onnxruntime, on the CPU.

    Args:
      path: of the file.
      optimized: by onnxruntime's default; if False, every node is run as it is written.

    Raises:
      ValueError, ModuleNotFoundError: as `open_file`.
    """
    check_path("path", path)
    extras.require("onnxruntime", by="running an ONNX file")
    import onnxruntime

    path = Path(path).expanduser()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised, in one sentence
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many classes, all of its own
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no ONNX file that onnxruntime can run, or a damaged one: {reason}"
        ) from error
    try:
        entries = session.get_modelmeta().custom_metadata_map
        metadata = Metadata.from_strings(entries)
    except ValueError as error:
        raise ValueError(f"{path} was not exported by this library: {error}") from error
    if CHECKSUM in entries and not is_unaltered(path.read_bytes(), entries[CHECKSUM]):
        raise ValueError(
            f"{path} is damaged, or another program has changed it: it is not the one that was written; "
            f"export it again, or take the entry {CHECKSUM} out of its metadata_props if the change is meant"
        )
    inputs, outputs = (
        [_onnx_port(value) for value in values] for values in (session.get_inputs(), session.get_outputs())
    )
    names = [port.name for port in outputs]

    def run(images: np.ndarray) -> dict[str, Any]:
        return dict(zip(names, session.run(None, {inputs[0].name: images}), strict=True))

    return FileNetwork(path, metadata, inputs, outputs, run)


def _port(name: str, aval: Any) -> Port:
    return Port(name, str(aval.dtype), tuple(n if isinstance(n, int) else str(n) for n in aval.shape))


def _onnx_port(value: Any) -> Port:
    dtype: str = value.type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    return Port(value.name, dtype, tuple(value.shape))
