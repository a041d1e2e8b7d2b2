"""What a run is about, classification or detection: what the trainer asks of either, and how they are
measured.

The loop, the state and the checkpoints know this interface only; `classification` and `detection` are the two
that there are.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.sharding import Mesh

from repopt_jax import models
from repopt_jax.core.scales import Scales, load_scales
from repopt_jax.nn.block import ACTIVATIONS
from repopt_jax.surgery.search import depth_scales
from repopt_jax.train.config import Config, DataConfig

Batch = dict[str, jax.Array]
# (model, batch) -> (mean loss over the batch's images, sums over them of what the log averages)
Objective = Callable[[Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number in [0, 1] that an evaluation gives: its name in records, and what people call it."""

    name: str
    label: str


# The first of a task is what its runs are compared by.
METRICS: dict[str, tuple[Metric, ...]] = {
    "classify": (Metric("accuracy", "test accuracy"),),
    "detect": (
        Metric("ap50", "AP50"),
        Metric("ap", "AP"),
        Metric("keypoint_ap50", "keypoint AP50"),
        Metric("keypoint_ap", "keypoint AP"),
    ),
}


def told(task: str, measured: Mapping[str, Any]) -> str:
    """The numbers of an evaluation in a line: `test accuracy 97.20%`; a number that is None is left out."""
    values = [(metric.label, measured.get(metric.name)) for metric in METRICS[task]]
    return ", ".join(f"{label} {value:.2%}" for label, value in values if value is not None)


class Task(abc.ABC):
    """One kind of run, for one config."""

    # What the log averages beside the loss, and the dtype in which it is summed.
    sums: ClassVar[Mapping[str, Any]]

    def __init__(self, config: Config):
        self.config = config

    @abc.abstractmethod
    def open_data(self, settings: DataConfig) -> tuple[Any, Any]:
        """The data set and what is done to its images.

        Raises:
          FileNotFoundError, ValueError: the data are missing or cannot be used.
        """

    @abc.abstractmethod
    def train_batches(self, source: Any, transform: Any, **options: Any) -> Any:
        """As `data.train_batches`."""

    @abc.abstractmethod
    def eval_batches(self, source: Any, transform: Any, **options: Any) -> Any:
        """As `data.eval_batches`."""

    @abc.abstractmethod
    def model_options(self, info: Any) -> dict[str, Any]:
        """What `models.create` is given besides the name and the numbers of classes and channels."""

    def new_model(self, info: Any, *, seed: int) -> models.Network:
        """The config's network for this data, plain."""
        return models.create(
            self.config.model.name,
            num_classes=info.num_classes,
            in_channels=info.channels,
            rngs=nnx.Rngs(seed),
            **self.model_options(info),
        )

    def resolve_scales(self, name: str, info: Any) -> Scales:
        """The scales that a config names, for its network on this data: "ones", "depth" or a directory.

        Raises:
          FileNotFoundError, ValueError: the scales are missing, do not fit the network, or were searched with
            another activation.
        """
        model = nnx.eval_shape(lambda: self.new_model(info, seed=0))
        if name in ("ones", "depth"):
            rule = depth_scales(model) if name == "depth" else Scales.ones(model.branch_sets())
            return rule.with_metadata(architecture=self.architecture())
        scales = load_scales(name, model)
        searched, activation = scales.metadata.architecture.rpartition("/")[2], self.config.model.activation
        if searched in ACTIVATIONS and searched != activation:
            raise ValueError(
                f"the scales in {name} were searched with {searched}, and `model.activation` is "
                f"{activation!r}: use the same in search and training"
            )
        return scales

    def architecture(self) -> str:
        """What files of scales call the network."""
        return models.find(self.config.model.name).variant.architecture

    @abc.abstractmethod
    def objective(self, model: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The training loss of a network in training mode, and the sums that `sums` declares."""

    @abc.abstractmethod
    def make_evaluator(
        self, graphdef: Any, source: Any, mesh: Mesh
    ) -> Callable[[Any, Any, Iterable[dict[str, Any]]], dict[str, Any]]:
        """`evaluate(params, rest, batches) -> numbers`: those of `METRICS`, "loss" (or None) and "count"."""
