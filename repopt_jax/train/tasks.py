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

from repopt_jax.core.scales import Scales
from repopt_jax.train.config import Config, DataConfig
from repopt_jax.train.state import Batch


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


def format_metrics(task: str, measured: Mapping[str, Any]) -> str:
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
    def new_model(self, info: Any, *, seed: int, scales: Scales | None = None) -> nnx.Module:
        """A network of the config's kind for this data; `scales` are where a search starts and the constants
        of a csla network."""

    @abc.abstractmethod
    def resolve_scales(self, name: str, info: Any) -> Scales:
        """The scales that a config names, for its network on this data: "ones", "depth" or a directory.

        Raises:
          FileNotFoundError, ValueError: the scales are missing or do not fit the network.
        """

    @abc.abstractmethod
    def architecture(self) -> str:
        """What the network is called in a file of scales."""

    @abc.abstractmethod
    def objective(self, model: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The training loss of a network in training mode, and the sums that `sums` declares."""

    @abc.abstractmethod
    def make_evaluator(
        self, graphdef: Any, source: Any, mesh: Mesh
    ) -> Callable[[Any, Any, Iterable[dict[str, Any]]], dict[str, Any]]:
        """`evaluate(params, rest, batches) -> numbers`: those of `METRICS`, "loss" (or None) and "count"."""
