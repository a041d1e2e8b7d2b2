"""What the function in a file computes: preprocessing, the network, its outputs by name, and decoding."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.arguments import check_kind
from repopt_jax.data.transforms import scale_and_shift
from repopt_jax.detection import Detections, Outputs, decode
from repopt_jax.detection.outputs import locations_of
from repopt_jax.export.metadata import Metadata

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
    """Outputs by name: "logits" of a classifier, the fields of a named tuple, `output` of another array,
    `output_0` ... of several."""
    if isinstance(outputs, dict):
        return outputs
    if hasattr(outputs, "_asdict"):
        return outputs._asdict()
    if isinstance(outputs, (tuple, list)):
        return {f"output_{i}": output for i, output in enumerate(outputs)}
    return {"logits" if task == "classify" else "output": outputs}


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
