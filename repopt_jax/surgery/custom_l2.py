"""RepVGG's L2 penalty: of the kernels that the branches merge into, instead of each branch by itself."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from repopt_jax.core.algebra import scale_output
from repopt_jax.core.branches import Kernel
from repopt_jax.core.published import repvgg
from repopt_jax.nn.branched import Branched, affine_of
from repopt_jax.surgery.modules import named_modules


def custom_l2(model: nnx.Module) -> jax.Array:
    """Returns the penalty of all RepVGG layers of a model, (), which takes the place of their weight decay.

        loss = cross_entropy + weight_decay / 2 * custom_l2(model)
        mask = weight_decay_mask(model, custom_l2=True)
        tx = optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(...))

    For a layer with the kernel K and the 1x1 kernel P, c being the centre tap of any odd window,

        L = sum of K^2 over the other taps + sum over channels of (t_K K_c + t_P P)^2 / (t_K^2 + t_P^2),
        t = gamma / sqrt(running var + eps), signed, of the batch norm after each kernel, without a gradient

    The identity's branch is not part of it. The division makes the coefficient comparable to that of ordinary
    decay; where both t are 0 the second sum is 0. A layer without a smaller 1x1 kernel has the plain sum of
    squares. After the forward pass in training mode the running variances are those of this step, as in the
    published code.

    The authors of QARepVGG (arXiv 2212.01593, section 3) find that networks trained with this penalty have
    activations of far larger variance, which INT8 represents badly, and use ordinary decay. Where the fused
    network is to be quantized, do the same.

    Source: RepVGG, `get_custom_L2` of the published code.

    Raises:
      ValueError: the model has no RepVGG layer.
    """
    layers = repvgg_layers(model)
    if not layers:
        raise ValueError("`model` has no RepVGG layer: this penalty is of those that `to_repvgg` makes")
    return functools.reduce(jnp.add, map(_of_layer, layers.values()))


def repvgg_layers(model: nnx.Module) -> dict[str, Branched]:
    """Returns the layers that have the branches of `core.published.repvgg`, by path."""
    return {
        path: module
        for path, module in named_modules(model)
        if isinstance(module, Branched) and module.structure == repvgg(module.structure.layer)
    }


def _of_layer(layer: Branched) -> jax.Array:
    geometry = layer.structure.layer
    own, point = Kernel(geometry.window).name, Kernel((1,) * geometry.axes).name
    kernel = layer.weights[own][...]
    if not geometry.has_pointwise:
        return jnp.sum(kernel**2)
    scales = [lax.stop_gradient(affine_of(layer.norms[name])[0]) for name in (own, point)]
    centre = tuple(n // 2 for n in geometry.window)
    at_centre = kernel[centre]
    # P and K_c are (in/groups, out).
    merged = scale_output(at_centre, scales[0]) + scale_output(
        layer.weights[point][...][(0,) * len(centre)], scales[1]
    )
    size = scales[0] ** 2 + scales[1] ** 2
    centres = scale_output(merged**2, jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0))
    return jnp.sum(kernel.at[centre].set(0) ** 2) + jnp.sum(centres)
