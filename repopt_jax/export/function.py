"""What the function in a file computes: preprocessing, the network, its outputs by name, and decoding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.data.transforms import scale_and_shift
from repopt_jax.detection import Detections, Outputs, decode
from repopt_jax.detection.outputs import locations_of
from repopt_jax.export.metadata import Metadata


def file_function(model: nnx.Module, metadata: Metadata) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The function from images, (batch, *metadata.input_shape) of `metadata.dtype`, to outputs by name.

    Args:
      model: takes images (batch, height, width, channels).
      metadata: says what the images are, and whether a detector's outputs are decoded.
    """
    graph, state = nnx.split(model)

    def function(images: jax.Array) -> dict[str, jax.Array]:
        outputs = nnx.merge(graph, state, copy=True)(network_input(images, metadata))
        return named_outputs(decoded(outputs, metadata) if metadata.decoded else outputs, metadata.task)

    return function


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
