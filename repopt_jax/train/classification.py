"""Classification: cross-entropy, of mixed images too, accuracy, and the networks of `train.networks`."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from repopt_jax import data
from repopt_jax.core.scales import Scales, load_scales
from repopt_jax.train.config import DataConfig
from repopt_jax.train.networks import find_network
from repopt_jax.train.state import add_sums, merge_model, put_batch, replicated, zero_sums
from repopt_jax.train.tasks import Batch, Task


class Classification(Task):
    """One label an image."""

    sums = {"accuracy": jnp.int32}  # noqa: RUF012  (constant)

    def open_data(self, settings: DataConfig) -> tuple[data.Source, data.Transform]:
        source = data.open_source(
            settings.source,
            name=settings.name or None,
            data_dir=os.path.expanduser(settings.data_dir) or None,
        )
        transform = data.Transform(
            image_size=settings.image_size,
            crop_padding=settings.crop_padding,
            flip=settings.flip,
            area=settings.area,
            resize=settings.resize,
            randaugment=settings.randaugment,
            jitter=settings.jitter,
            erasing=settings.erasing,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            mean=settings.mean,
            std=settings.std,
        )
        return source, transform

    def train_batches(self, source, transform, **options):
        return data.train_batches(source, transform, **options)

    def eval_batches(self, source, transform, **options):
        return data.eval_batches(source, transform, **options)

    def new_model(self, info: data.DatasetInfo, *, seed: int, scales: Scales | None = None) -> nnx.Module:
        model = self.config.model
        family, key = find_network(model.variant)
        options: dict[str, Any] = {name: getattr(model, name) for name in family.options}
        if scales is not None:
            options["scales"] = scales
        return family.make(
            family.variants[key],
            num_classes=info.num_classes,
            in_channels=info.channels,
            dtype=None if model.dtype == "float32" else jnp.dtype(model.dtype),
            rngs=nnx.Rngs(seed),
            **options,
        )

    def resolve_scales(self, name: str, info: data.DatasetInfo) -> Scales:
        model: Any = nnx.eval_shape(lambda: self.new_model(info, seed=0))
        if name == "ones":
            return model.unit_scales()
        if name == "depth":
            return model.depth_scales()
        return load_scales(name, model)

    def architecture(self) -> str:
        family, key = find_network(self.config.model.variant)
        return family.architecture + key

    def objective(self, model: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = model(batch["image"])
        losses, label = mixed_cross_entropy(logits, batch, label_smoothing=self.config.optim.label_smoothing)
        return losses.mean(), {"accuracy": count_correct(logits, label)}

    def make_evaluator(self, graphdef: Any, source: Any, mesh: Mesh):
        step = make_eval_step(graphdef)

        def evaluate(params: Any, rest: Any, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
            sums = jax.device_put(zero_sums(self.sums), replicated(mesh))
            for batch in batches:
                sums = step(params, rest, sums, put_batch(batch, mesh))
            return sums_to_means(sums)

        return evaluate


def make_eval_step(
    graphdef: Any,
) -> Callable[[Any, Any, dict[str, jax.Array], Batch], dict[str, jax.Array]]:
    """The jitted evaluation step, with running batch statistics.

    Returns:
      `step(params, rest, sums, batch) -> sums`, which adds a batch to the sums of loss, correct answers
      ("accuracy") and images. Images whose "mask" is 0 are padding and count for nothing. The loss is the
      plain cross-entropy, whatever smoothing training used.
    """

    def eval_step(params, rest, sums, batch):
        model = merge_model(graphdef, params, rest)
        model.eval()
        logits, real = model(batch["image"]), batch["mask"] > 0
        # Selected, not multiplied: padding may give any number, and 0 * nan is nan.
        loss = jnp.where(real, cross_entropy(logits, batch["label"]), 0).sum()
        correct = count_correct(logits, batch["label"], real=real)
        return add_sums(sums, {"loss": loss, "accuracy": correct, "count": real.sum(dtype=jnp.int32)})

    return jax.jit(eval_step, donate_argnums=2)


def sums_to_means(sums: dict[str, jax.Array]) -> dict[str, Any]:
    """Loss, accuracy and count as Python numbers."""
    host = jax.device_get(sums)
    count = int(host["count"])
    return {
        "loss": float(host["loss"]) / max(count, 1),
        "accuracy": int(host["accuracy"]) / max(count, 1),
        "count": count,
    }


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each image, (N, classes) and (N,) -> (N,), computed in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def mixed_cross_entropy(
    logits: jax.Array, batch: Batch, *, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """share * CE(label) + (1 - share) * CE(other) of each image, (N,), and the label of the larger share,
    (N,) int32: "label" where they are equal.

    A batch of images that are not mixed has no "other" and no "share"; then CE(label) and its label.
    """
    label = batch["label"]
    losses = cross_entropy(logits, label, label_smoothing=label_smoothing)
    if "other" not in batch:
        return losses, label
    other, share = batch["other"], batch["share"].astype(losses.dtype)
    losses_of_other = cross_entropy(logits, other, label_smoothing=label_smoothing)
    return share * losses + (1 - share) * losses_of_other, jnp.where(share < 0.5, other, label)


def count_correct(logits: jax.Array, labels: jax.Array, *, real: jax.Array | bool = True) -> jax.Array:
    """How many images, of those that are `real`, have their largest logit at the label; () int32."""
    return ((logits.argmax(-1) == labels) & real).sum(dtype=jnp.int32)
