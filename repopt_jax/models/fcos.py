"""FCOS with keypoints: a detector without anchors, with a prediction at every location of a feature pyramid.

Backbone (`EfficientRep`) -> pyramid of maps of equal width (`FPN`) -> towers of 3x3 blocks shared by all
levels (`FCOSHead`): class, box with centerness, and keypoints. The 3x3 blocks of backbone and towers can be
re-parameterized.

Paths: `backbone/stages/{s}/{i}`, `pyramid/{laterals,outputs,extras}/{i}`,
`head/{class,box,keypoint}_tower/{i}`, `head/{classes,boxes,centerness,keypoints}`,
`head/{box,keypoint}_scale`.
Sources: FCOS (arXiv 1904.01355), FPN (arXiv 1612.03144); extra levels as in RetinaNet (arXiv 1708.02002).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.arguments import check_count
from repopt_jax.core.structure import Geometry
from repopt_jax.detection.outputs import Locations, Outputs, locations_of
from repopt_jax.models.efficientrep import BACKBONES, BackboneVariant, EfficientRep
from repopt_jax.models.mosaic import Mosaic
from repopt_jax.models.network import LayerSpec, Network, check_variant
from repopt_jax.nn.block import ACTIVATIONS, Block, block, check_activation, conv
from repopt_jax.nn.convolution import conv_general_dilated

# The network predicts the logarithm of a distance, clipped here so that no step makes it infinite (1097
# strides).
MAX_LOG_DISTANCE = 7.0
# Initial probability of every class at every location, so that the many empty locations do not dominate the
# loss (RetinaNet, section 4.1).
PRIOR = 0.01
BACKBONE_STRIDES = (4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class DetectorVariant:
    """One detector.

    Attributes:
      name: key in `DETECTORS`.
      backbone: variant of the backbone.
      channels: width of the pyramid and of the towers.
      maps: number of the backbone's four maps that the pyramid takes, counted from the last.
      levels: levels of the pyramid; those beyond `maps` are made from the backbone's last map.
      tower: number of 3x3 blocks of each tower.
    """

    name: str
    backbone: BackboneVariant
    channels: int
    maps: int
    levels: int
    tower: int

    def __post_init__(self) -> None:
        if not 1 <= self.maps <= len(BACKBONE_STRIDES):
            raise ValueError(f"`maps` of {self.name!r} is {self.maps}: a backbone has 4 maps to take from")
        if self.levels < self.maps:
            raise ValueError(
                f"`levels` of {self.name!r} is {self.levels}, fewer than `maps`, {self.maps}: "
                "each map is a level"
            )

    @property
    def architecture(self) -> str:
        """The network's name in scales files."""
        return self.name

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one location to the next, level by level."""
        first = BACKBONE_STRIDES[-self.maps]
        return tuple(first * 2**level for level in range(self.levels))


DETECTORS: dict[str, DetectorVariant] = {
    variant.name: variant
    for variant in (
        DetectorVariant("face", BACKBONES["face"], 96, maps=3, levels=5, tower=4),
        # Widths of pyramid and towers are ours: YOLOv6 has another neck and another head.
        DetectorVariant("efficientrep-N", BACKBONES["efficientrep-N"], 64, maps=3, levels=5, tower=2),
        DetectorVariant("efficientrep-T", BACKBONES["efficientrep-T"], 96, maps=3, levels=5, tower=2),
        DetectorVariant("efficientrep-S", BACKBONES["efficientrep-S"], 128, maps=3, levels=5, tower=2),
        DetectorVariant("scenes", BACKBONES["scenes"], 32, maps=3, levels=3, tower=2),
    )
}


class FCOS(Network):
    """The detector. `__call__`: images (batch, height, width, in_channels) -> `Outputs`, float32.

    Args:
      variant: a row of `DETECTORS`, or one of your own.
      num_classes: number of object classes, without the background.
      num_keypoints: number of keypoints of each object; 0 for boxes only.
      in_channels: channels of the images.
      activation: "relu" or "relu6", for all blocks.
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.

    Raises:
      ValueError: an unknown activation, no class, or a negative number of keypoints.
      TypeError: numbers or `rngs` of another type, or no variant.
    """

    def __init__(
        self,
        variant: DetectorVariant,
        *,
        num_classes: int,
        num_keypoints: int = 0,
        in_channels: int = 3,
        activation: str = "relu",
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        options = {"activation": activation, "dtype": dtype, "rngs": rngs}
        check_variant(variant, DetectorVariant)
        self.variant = variant
        self.backbone: EfficientRep = EfficientRep(variant.backbone, in_channels=in_channels, **options)
        widths = variant.backbone.widths[-variant.maps :]
        self.pyramid: FPN = FPN(widths, variant.channels, levels=variant.levels, **options)
        self.head: FCOSHead = FCOSHead(
            variant.channels, variant.tower, variant.levels, num_classes, num_keypoints, **options
        )

    def __call__(self, x: jax.Array) -> Outputs:
        return self.head(self.pyramid(self.backbone(x)[-self.variant.maps :]))

    def locations(self, image_size: int | tuple[int, int]) -> Locations:
        """Returns the locations of the outputs for images of this size (height, width), as NumPy arrays."""
        return locations_of(image_size, self.variant.strides)

    @property
    def architecture(self) -> str:
        return self.variant.architecture

    @property
    def predictions(self) -> tuple[str, ...]:
        """Paths of the head's last layers, which predict. Their errors are not averaged by any layer behind
        them, and distances go through an exponential: INT8 leaves them in floating point."""
        names = ("classes", "boxes", "centerness", "keypoints")
        return tuple(f"head/{name}" for name in names if getattr(self.head, name) is not None)

    def layers(self) -> dict[str, LayerSpec]:
        """Returns the 3x3 convolutions of backbone and towers."""
        backbone = {f"backbone/{path}": spec for path, spec in self.backbone.layers().items()}
        channels = self.variant.channels
        towers = {
            f"head/{tower}/{i}/conv/kernel": LayerSpec(Geometry((3, 3), channels, channels))
            for tower in self.head.towers
            for i in range(self.variant.tower)
        }
        return backbone | towers


class FPN(nnx.Module):
    """Feature pyramid. `__call__`: maps, each half as large as the previous -> `levels` maps of `channels`.

    Each map goes through a 1x1 layer; the sum of the coarser maps, upsampled by repeating pixels (and cut if
    the size is odd), is added; and the result goes through a 3x3 layer. Further levels are made from the last
    input map by 3x3 layers of stride 2 with the activation between them. All these layers are plain, with
    biases.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        channels: int,
        *,
        levels: int,
        activation: str = "relu",
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_activation(activation)
        self.activation = activation

        def layer(width: int, size: int, stride: int = 1) -> nnx.Conv:
            return conv(width, channels, size, stride=stride, bias=True, dtype=dtype, rngs=rngs)

        self.laterals: nnx.List[nnx.Conv] = nnx.List([layer(width, 1) for width in inputs])
        self.outputs: nnx.List[nnx.Conv] = nnx.List([layer(channels, 3) for _ in inputs])
        extra = range(levels - len(inputs))
        self.extras: nnx.List[nnx.Conv] = nnx.List(
            [layer(channels if i else inputs[-1], 3, 2) for i in extra]
        )

    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + upsample(merged[i + 1], merged[i].shape[1:3])
        levels = [output(x) for output, x in zip(self.outputs, merged)]
        x = maps[-1]
        for i, extra in enumerate(self.extras):
            x = extra(ACTIVATIONS[self.activation](x) if i else x)
            levels.append(x)
        return levels


def upsample(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Repeats every pixel of (N, h, w, C) twice in both directions, cropped to `size` (2h or 2h - 1, ...)."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, : size[0], : size[1]]


class FCOSHead(nnx.Module):
    """Shared head. `__call__`: one map (N, h, w, channels) for each level -> `Outputs`.

    All levels share one set of towers and go through it in one map (`Mosaic`). Centerness is predicted from
    the box tower. Each level has a trainable factor for its distances, distance = exp(factor * prediction),
    and one for its keypoint offsets.
    """

    def __init__(
        self,
        channels: int,
        tower: int,
        levels: int,
        num_classes: int,
        num_keypoints: int,
        *,
        activation: str = "relu",
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        check_count("num_classes", num_classes)
        check_count("num_keypoints", num_keypoints, at_least=0)

        def blocks() -> nnx.List[Block]:
            options = {"activation": activation, "dtype": dtype, "rngs": rngs}
            return nnx.List([block(channels, channels, 3, **options) for _ in range(tower)])

        def prediction(outputs: int, bias: float = 0.0) -> nnx.Conv:
            return nnx.Conv(
                channels,
                outputs,
                (3, 3),
                padding=((1, 1), (1, 1)),
                kernel_init=nnx.initializers.normal(0.01),
                bias_init=nnx.initializers.constant(bias),
                conv_general_dilated=conv_general_dilated,
                dtype=dtype,
                rngs=rngs,
            )

        self.class_tower: nnx.List[Block] = blocks()
        self.box_tower: nnx.List[Block] = blocks()
        self.classes: nnx.Conv = prediction(num_classes, -math.log((1 - PRIOR) / PRIOR))
        self.boxes: nnx.Conv = prediction(4)
        self.centerness: nnx.Conv = prediction(1)
        self.box_scale: nnx.Param[jax.Array] = nnx.Param(jnp.ones((levels,)))
        self.keypoint_tower: Any = nnx.data(blocks() if num_keypoints else None)
        self.keypoints: Any = nnx.data(prediction(2 * num_keypoints) if num_keypoints else None)
        self.keypoint_scale: Any = nnx.data(nnx.Param(jnp.ones((levels,))) if num_keypoints else None)

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the head's towers."""
        return ("class_tower", "box_tower", *(("keypoint_tower",) if self.keypoints is not None else ()))

    def __call__(self, levels: Sequence[jax.Array]) -> Outputs:
        mosaic = Mosaic([(level.shape[1], level.shape[2]) for level in levels])
        x = mosaic.pack(levels)
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def through(tower: nnx.List[Block]) -> jax.Array:
            y = x
            for layer in tower:
                y = mosaic.clear(layer(y))
            return y

        def predicted(layer: nnx.Conv, y: jax.Array) -> jax.Array:
            return mosaic.flat(layer(y)).astype(wide)

        def by_level(factors: nnx.Param) -> jax.Array:
            return factors[...][mosaic.levels][None, :, None]

        box = through(self.box_tower)
        logs = predicted(self.boxes, box) * by_level(self.box_scale)
        classes = predicted(self.classes, through(self.class_tower))
        keypoints = jnp.zeros((*classes.shape[:2], 0, 2), wide)
        if self.keypoints is not None:
            y = predicted(self.keypoints, through(self.keypoint_tower)) * by_level(self.keypoint_scale)
            keypoints = y.reshape(*y.shape[:2], y.shape[-1] // 2, 2)
        return Outputs(
            classes,
            jnp.exp(jnp.minimum(logs, MAX_LOG_DISTANCE)),
            predicted(self.centerness, box)[..., 0],
            keypoints,
        )
