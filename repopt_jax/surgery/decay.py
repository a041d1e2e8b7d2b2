"""Which parameters of a model are decayed, as published: kernels are, and of the vectors only those that
stand for a kernel.

A plain layer says it by what its parameters are; a layer of a structure by its stages
(`core.structure.Stage`): the identity's vector is decayed with the kernels, because in a plain network that
kernel is part of the decayed one, and scales are not."""

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from repopt_jax.core import paths
from repopt_jax.nn.branched import StructuredLayer
from repopt_jax.surgery.modules import join, named_modules


def weight_decay_mask(model: nnx.Module) -> Callable[[Any], Any]:
    """The mask for `optax.add_decayed_weights` and its like: a function from parameters to a tree of
    booleans.

        optax.add_decayed_weights(4e-5, weight_decay_mask(model))

    Decayed are kernels of all layers, and what the stages of structures say. Biases, batch norms, and other
    vectors and scalars are not.

    Raises:
      ValueError: parameters of more than one axis that are neither a layer's kernel nor in a structure, all
        of them listed: there is no default for them, so give a mask of your own.
    """
    decayed: dict[str, bool] = {}
    for path, module in named_modules(model):
        if isinstance(module, StructuredLayer):
            decayed |= {join(path, name): value for name, value in _of_structure(module)}
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                decayed.setdefault(join(path, name), name == "kernel" or _undecided(value))
    if unknown := [path for path, value in decayed.items() if value is None]:
        raise ValueError(
            f"{', '.join(unknown)} are neither kernels nor vectors: whether weight decay applies to them is "
            "yours to say, in a mask of your own"
        )

    def mask(params: Any) -> Any:
        return paths.map_named(lambda path, _: decayed[path], params)

    return mask


def scale_paths(model: nnx.Module) -> frozenset[str]:
    """Paths of the trainable scales in layers of structures: what a search finds, identities left out."""
    return frozenset(
        join(path, f"scales/{key}")
        for path, module in named_modules(model)
        if isinstance(module, StructuredLayer)
        for key in module.structure.followers("scale")
    )


def _undecided(value: nnx.Param) -> Any:
    """False for a vector, None for what has more axes."""
    return False if len(value.shape) <= 1 else None


def _of_structure(layer: StructuredLayer) -> Iterator[tuple[str, bool]]:
    """(path inside the layer, whether it is decayed) of everything that a structure owns."""
    for part in layer.structure.parts:
        yield f"weights/{part.key}", part.stage.decay
        yield f"scales/{part.key}", part.stage.decay_gain
        yield f"norms/{part.key}/scale", part.stage.decay_gain
        yield f"norms/{part.key}/bias", False
