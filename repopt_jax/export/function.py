"""What the function in a file computes: preprocessing, the network, its outputs by name, and decoding."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.arguments import check_kind
from repopt_jax.data.transforms import scale_and_shift
from repopt_jax.detection import Detections, Outputs, decode
from repopt_jax.detection.outputs import locations_of
from repopt_jax.export.metadata import Metadata

INPUT = "images"
Call: TypeAlias = Callable[[Any, jax.Array], Any]


def file_function(
    model: nnx.Module, metadata: Metadata, call: Call | None = None
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The function from images, (batch, *metadata.input_shape) of `metadata.dtype`, to outputs by name.

    Args:
      model: takes images (batch, height, width, channels).
      metadata: says what the images are, and whether a detector's outputs are decoded.
      call: how the model is called with images; with these alone by default.
    """
    graph, state = nnx.split(model)
    call = call or call_alone

    def function(images: jax.Array) -> dict[str, jax.Array]:
        outputs = call(nnx.merge(graph, state, copy=True), network_input(images, metadata))
        _check_fit(named_outputs(outputs), metadata)
        return named_outputs(decoded(outputs, metadata) if metadata.decoded else outputs, metadata.task)

    return function


def call_alone(model: Any, images: jax.Array) -> Any:
    """Calls a model with images and nothing else."""
    return model(images)


def checked_call(model: nnx.Module, call: Call | None) -> Call:
    """Returns how a model is called with images: `call`, or with images alone where it is None.

    Raises:
      TypeError: `call` is no function.
      ValueError: it is not given, and the model takes other arguments than one.
    """
    if call is not None:
        check_kind("call", call, Callable, "a function of a model and images")
        return call
    if not callable(model):
        raise ValueError(f"`model` of class {type(model).__name__} has no `__call__`: give `call`")
    try:
        inspect.signature(model).bind(None)
    except TypeError as error:
        raise ValueError(
            f"`model` is not called with images alone ({error}): give `call`, such as "
            "`lambda model, images: model(images, train=False)`"
        ) from error
    return call_alone


@contextlib.contextmanager
def any_batch_size() -> Iterator[None]:
    """For tracing with a symbolic batch size: says what to do where a network takes it as a number.

    Raises:
      ValueError: it does.
    """
    try:
        yield
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        if isinstance(error, TypeError) and "_DimExpr" not in str(error):
            raise
        raise ValueError(
            "the network takes the batch size as a number of Python, and in a file for any batch size it is "
            "a symbol: write `x.shape[0]` in place of `len(x)`, and neither count to it nor compare it "
            f"({str(error).partition(chr(10))[0]})"
        ) from error


def network_input(images: jax.Array, metadata: Metadata) -> jax.Array:
    """Images as the file takes them -> as the network does: normalised, (batch, height, width, channels)."""
    if metadata.layout == "NCHW":
        images = jnp.moveaxis(images, 1, -1)
    if metadata.input == "normalised":
        return images
    scale, shift = (v[None, None, None] for v in scale_and_shift(metadata.mean, metadata.std))
    return images.astype(jnp.float32) * scale - shift


def named_outputs(outputs: Any, task: str = "") -> dict[str, jax.Array]:
    """Outputs by name: "logits" of a classifier, the fields of a named tuple or dict, `output` of another
    array, `output_0` ... of several; what is inside another has its name behind the other's, as `output_1_0`.
    None is no output.

    Raises:
      ValueError: no outputs; what is no array; names that are no text, that two have, or that the input has.
    """
    found: dict[str, jax.Array] = {}
    problems: dict[str, None] = {}

    def add(name: str, value: Any) -> None:
        items = _items(value)
        if items is None and isinstance(value, (jax.Array, np.ndarray, np.generic, int, float)):
            if name in found:
                problems[f"two outputs have the name {name!r}"] = None
            found[name] = jnp.asarray(value)
        elif items is None:
            problems[f"{name or 'the output'} is of type {type(value).__name__}, which is no array"] = None
        for key, item in items or ():
            if isinstance(key, str) and key:
                add(f"{name}_{key}" if name else key, item)
            elif isinstance(value, (tuple, list)):
                add(f"{name or 'output'}_{key}", item)
            else:
                problems[f"{key!r} of {name or 'the outputs'} is no name: give it a text"] = None

    single = _items(outputs) is None
    add("" if not single else "logits" if task == "classify" else "output", outputs)
    if INPUT in found:
        problems[f"an output has the name {INPUT!r}, which is the input's: give it another"] = None
    if not found and not problems:
        problems["it has none"] = None
    if problems:
        raise ValueError(f"the outputs of the network cannot be in a file: {'; '.join(problems)}")
    return found


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """What is in an output, by name or number; nothing in None, and None for what holds nothing."""
    if value is None:
        return []
    if hasattr(value, "_asdict"):
        return list(value._asdict().items())
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (tuple, list)) else None


def _check_fit(outputs: Mapping[str, jax.Array], metadata: Metadata) -> None:
    """Raises ValueError if outputs, as the network names them, are not those of which the metadata speak."""
    names, shapes = list(outputs), {name: y.shape for name, y in outputs.items()}
    detects = tuple(names) == Outputs._fields
    given = f"`metadata.task` is {metadata.task!r}, and the network gives {', '.join(names)}"
    problems = []

    def count(field: str, values: int, output: str, axis: int, what: str) -> None:
        if len(shapes[output]) < 1 - min(axis, -1) or shapes[output][axis] != values:
            problems.append(f"`metadata.{field}` has {values} names, and {what} {_shown(shapes[output])}")

    if metadata.task == "detect" and not detects:
        problems.append(f"{given}: a detector gives {', '.join(Outputs._fields)}")
    elif metadata.task == "detect":
        count("class_names", len(metadata.class_names), "classes", -1, "`classes` is")
        if metadata.keypoint_names:
            count("keypoint_names", len(metadata.keypoint_names), "keypoints", -2, "`keypoints` is")
        locations = len(locations_of(metadata.image_size, metadata.strides).points)
        if shapes["classes"][1] != locations:
            problems.append(
                f"`metadata.strides`, {metadata.strides}, stand for {locations} locations, and the outputs "
                f"have {shapes['classes'][1]}"
            )
    elif metadata.task == "classify" and detects:
        problems.append(f"{given}, as a detector does")
    elif metadata.task == "classify":
        count("class_names", len(metadata.class_names), names[0], -1, "the logits are")
    if problems:
        raise ValueError(f"the metadata do not fit the network: {'; '.join(problems)}")


def _shown(shape: tuple[Any, ...]) -> str:
    return f"({', '.join(str(n) if isinstance(n, int) else 'b' for n in shape)})"


def decoded(outputs: Outputs, metadata: Metadata) -> Detections:
    """`detection.decode` with the options that the metadata hold."""
    return decode(
        outputs,
        locations_of(metadata.image_size, metadata.strides),
        metadata.image_size,
        score_threshold=metadata.score_threshold,
        iou_threshold=metadata.iou_threshold,
        count=metadata.max_detections,
    )
