"""Weight decay as published: of kernels, and of the vectors that are equivalent to a kernel.

In plain layers kernels are decayed. In layers of structures, the stages define it (`core.structure.Stage`):
the identity's vector is decayed with the kernels, because in a plain network it is part of the decayed
kernel, and scales are not decayed, except OREPA's.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx

from repopt_jax.core import paths
from repopt_jax.nn.branched import StructuredLayer
from repopt_jax.nn.compactor import Compactor
from repopt_jax.surgery.custom_l2 import repvgg_layers
from repopt_jax.surgery.modules import check_model, join, named_modules


def weight_decay_mask(model: nnx.Module, *, custom_l2: bool = False) -> Callable[[Any], Any]:
    """Returns a mask for `optax.add_decayed_weights`: a function from parameters to a tree of booleans.

        optax.add_decayed_weights(4e-5, weight_decay_mask(model))

    The kernels of all layers are decayed, and parameters of structures as their stages say. Biases, batch
    norms, compactors, and other vectors and scalars are not.

    Args:
      model: the model.
      custom_l2: whether the loss has the penalty `surgery.custom_l2`: then the kernels in RepVGG layers and
        the scales of their batch norms are not decayed, but the scale of the identity's batch norm is.

    Raises:
      ValueError: parameters of more than one axis that are neither a layer's kernel nor in a structure, all
        listed: there is no default for them, so give a mask of your own. From the mask, leaves that are no
        parameters of the model, such as batch statistics, all listed.
    """
    check_model(model)
    decayed: dict[str, bool] = {}
    for path, module in named_modules(model):
        if isinstance(module, StructuredLayer):
            decayed |= {join(path, name): value for name, value in module.structure.decayed().items()}
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                own = isinstance(module, Compactor)
                decayed.setdefault(
                    join(path, name), not own and (name == "kernel" or _undecided(name, value))
                )
    if custom_l2:
        for path, layer in repvgg_layers(model).items():
            for key in layer.structure.shapes():
                decayed |= {join(path, f"weights/{key}"): False, join(path, f"norms/{key}/scale"): False}
    if unknown := [path for path, value in decayed.items() if value is None]:
        raise ValueError(
            f"{', '.join(unknown)} are neither kernels nor vectors, so there is no default for their weight "
            "decay: give a mask of your own"
        )

    def mask(params: Any) -> Any:
        if others := [path for path in paths.named_leaves(params)[0] if path not in decayed]:
            raise ValueError(
                f"{', '.join(others)} are no parameters of the model that `weight_decay_mask` was given: "
                "give its mask nnx.state(model, nnx.Param), and make one for each model"
            )
        return paths.map_named(lambda path, _: decayed[path], params)

    return mask


def scale_paths(model: nnx.Module) -> frozenset[str]:
    """Returns the paths of the trainable scales in layers of structures, without the identities' vectors."""
    return frozenset(
        join(path, f"scales/{key}")
        for path, module in named_modules(model)
        if isinstance(module, StructuredLayer)
        for key in module.structure.followers("scale")
    )


def _undecided(name: str, value: nnx.Param) -> Any:
    """Returns False for biases, vectors and scalars, None for other arrays with more axes."""
    return False if name == "bias" or len(value.shape) <= 1 else None
