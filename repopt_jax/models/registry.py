"""Every network by name: `create` and `list`."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from flax import nnx

from repopt_jax.arguments import check_count, check_kind
from repopt_jax.hints import did_you_mean
from repopt_jax.models.fcos import DETECTORS, FCOS
from repopt_jax.models.ghost import GHOST_VARIANTS, ghostnet
from repopt_jax.models.mobileone import MOBILEONE_VARIANTS, mobileone
from repopt_jax.models.network import Network
from repopt_jax.models.published import PUBLISHED, Published
from repopt_jax.models.repmlp import REPMLP_VARIANTS, RepMLPNet
from repopt_jax.models.vgg import VGG_VARIANTS, vgg
from repopt_jax.nn.rngs import counted_in_python

Task = Literal["classify", "detect"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One network.

        models.register(models.Entry("my-net", make))  # make(num_classes=, in_channels=, dtype=, rngs=)

    Attributes:
      name: key in `NETWORKS`.
      family: `family(variant, num_classes=, rngs=, in_channels=, dtype=, **options)` builds it, plain: a
        `Network`, or any NNX model that is called with images alone. Without a variant it is not given one.
      variant: the row of its table; None where there is no table.
      mode: the way of training for which it is published, a `surgery.Mode`.
      task: "classify" or "detect".
      image_size, num_classes, in_channels: of the images that it is described for, which its numbers of
        parameters and of operations belong to; None for no size.
      published: the accuracy that its authors report; None where there is none.
    """

    name: str
    family: Callable[..., Any]
    variant: Any = None
    mode: str = "plain"
    task: Task = "classify"
    image_size: int | None = None
    num_classes: int = 1000
    in_channels: int = 3
    published: Published | None = None

    @property
    def architecture(self) -> str:
        """The network's name in files of scales: that of its variant, or else its own."""
        return getattr(self.variant, "architecture", self.name)


def create(
    name: str, *, num_classes: int, in_channels: int = 3, dtype: Any = None, rngs: nnx.Rngs, **options: Any
) -> Network:
    """Builds a plain network by name; `surgery.prepare` makes it ready for a way of training.

        model = models.create("repopt-vgg-b1", num_classes=1000, rngs=nnx.Rngs(0))

    Args:
      name: one of `list()`, in upper or lower case.
      num_classes: number of classes.
      in_channels: channels of the images.
      dtype: computation dtype, such as `jnp.bfloat16`; parameters are float32.
      rngs: `nnx.Rngs`.
      options: further arguments of the family: `post_se` and `activation` of a VGG, `activation` of a
        MobileOne, `dropout` of a GhostNet, `published_order` of a RepMLPNet, `num_keypoints` and
        `activation` of a detector.

    Raises:
      ValueError: an unknown name, with the nearest one; or arguments that the family refuses.
      TypeError: an option that the family does not have; numbers or `rngs` of another type.
    """
    entry = find(name)
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    with counted_in_python(rngs) as counted:
        row = () if entry.variant is None else (entry.variant,)
        return entry.family(*row, **sizes, dtype=dtype, rngs=counted, **options)


def list(task: Task | None = None) -> tuple[str, ...]:
    """Returns the names of all networks, or of those for one task."""
    return tuple(name for name, entry in NETWORKS.items() if task in (None, entry.task))


def register(entry: Entry) -> None:
    """Adds a network of your own, which `create`, configs and the command line then know by its name.

    A file that is executed again, as a config file or the cell of a notebook, may register its network again:
    what the same function of it makes takes the place of what it made before.

    Raises:
      ValueError: the name is taken by another network, or is not in lower case.
    """
    check_kind("entry", entry, Entry, "an `Entry`")
    known = NETWORKS.get(entry.name, entry)
    if entry.name != entry.name.lower() or (known != entry and not _made_again(known.family, entry.family)):
        raise ValueError(f"`entry` is named {entry.name!r}: it must be in lower case and not taken yet")
    NETWORKS[entry.name] = entry


def _made_again(before: Any, now: Any) -> bool:
    """Whether these are two objects of one definition, which was executed twice."""
    places = [(getattr(f, "__module__", ""), getattr(f, "__qualname__", "")) for f in (before, now)]
    return before is not now and places[0] == places[1] and all(places[0])


@contextlib.contextmanager
def registering(file: Path) -> Iterator[None]:
    """Notes in `FILES` that the networks that are registered meanwhile come from this file."""
    before = dict(NETWORKS)
    try:
        yield
    finally:
        FILES.update({name: file for name, entry in NETWORKS.items() if before.get(name) is not entry})


def find(name: str) -> Entry:
    """The entry of this name; ValueError for an unknown one."""
    if not isinstance(name, str):
        raise TypeError(f"`name` is of type {type(name).__name__}: it must be one of {', '.join(NETWORKS)}")
    if name.lower() not in NETWORKS:
        meant = did_you_mean(name, NETWORKS)
        raise ValueError(
            f"there is no network {name!r}{meant}: it must be one of {', '.join(NETWORKS)}, or one of "
            "your own that `models.register` has added in this program"
        )
    return NETWORKS[name.lower()]


# Unpublished small networks for images of at most 32 pixels; the other rows are RepVGG's.
_SMALL = ("cifar-small", "cifar-A0", "cifar-A0-narrow", "digits", "digits-deep", "cifar-deep")
# Part of a name -> side, classes and channels of the images, where these are not ImageNet's. The detector of
# faces is for images of any size, those on EfficientRep for YOLOv6's.
_IMAGES: dict[str, tuple[int | None, int, int]] = {
    "digits": (8, 10, 1),
    "cifar": (32, 10, 3),
    "fcos-scenes": (64, 10, 1),
    "fcos-face": (None, 1, 3),
    "fcos-efficientrep": (640, 80, 3),
}
# Rows that RepOptimizer publishes as well.
_REPOPT = ("B1", "B2", "L1", "L2")


def _entries() -> dict[str, Entry]:
    found: dict[str, Entry] = {}

    def add(prefix: str, key: str, family: Callable[..., Network], row: Any, mode: str, task: Task) -> None:
        name = (prefix + key).lower()
        published = PUBLISHED.get(name)
        size = 224 if published is None else published.image_size
        # Small networks by what they are for; detectors have the classes of COCO.
        own = next((images for word, images in _IMAGES.items() if word in name), (size, 1000, 3))
        found[name] = Entry(name, family, row, mode, task, *own, published)

    for key in _REPOPT:
        add("repopt-vgg-", key, vgg, VGG_VARIANTS[key], "repopt", "classify")
    for key, row in VGG_VARIANTS.items():
        prefix, mode = ("vgg-", "repopt") if key in _SMALL else ("repvgg-", "repvgg")
        add(prefix, key, vgg, row, mode, "classify")
    for key, row in GHOST_VARIANTS.items():
        add("repopt-ghostnet-", key, ghostnet, row, "repopt", "classify")
        add("repghost-", key, ghostnet, row, "repghost", "classify")
    for key, row in MOBILEONE_VARIANTS.items():
        add("mobileone-", key, mobileone, row, "mobileone", "classify")
    for key, row in REPMLP_VARIANTS.items():
        add("repmlpnet-", key, RepMLPNet, row, "repmlp", "classify")
    for key, row in DETECTORS.items():
        add("fcos-", key.removeprefix("fcos-"), FCOS, row, "repopt", "detect")
    return found


NETWORKS: dict[str, Entry] = _entries()
SHIPPED: frozenset[str] = frozenset(NETWORKS)
FILES: dict[str, Path] = {}  # name of a network of the user's own -> the config file that registers it
