"""How the gradient grows or fades from layer to layer: what trains a deep network, or does not."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.core import paths
from repopt_jax.train.build import build_model, make_task, open_feed
from repopt_jax.train.config import Config
from repopt_jax.train.state import merge_model, split_model


def gradient_by_layer(config: Config) -> dict[str, float]:
    """The size of each layer's gradient in the network that a run of `config` starts with, on its first
    batch.

    For a layer with the tensors w it is sqrt(sum over w of (|dL/dw| |w|)^2), in norms: how much the loss
    changes for a small *relative* change of the layer. A batch norm after a layer makes the gradient of a
    kernel twice as small when the kernel is twice as large, and this number the same. With a plain network
    and one with branches it means the same, as the latter's layers are sums of such tensors.

    Returns:
      Path of a re-parameterizable layer, `stages/1/0/conv` -> its number, from input to output.

    Raises:
      FileNotFoundError, ValueError: as `build_model` and `open_feed`.
    """
    task, feed = make_task(config), open_feed(config)
    plain = nnx.eval_shape(lambda: task.new_model(feed.source.info, seed=0))
    layers = [path.rpartition("/")[0] for path in plain.layers()]
    model, _ = build_model(config, feed.source.info)
    model.train()
    network = split_model(model)
    batch = {name: jnp.asarray(array) for name, array in next(iter(feed.train)).items()}

    @jax.jit
    def sizes(params: Any) -> dict[str, jax.Array]:
        def loss(params):
            net = merge_model(network.graphdef, params, network.non_trainable)
            net.train()
            return task.objective(net, batch)[0]

        gradients = paths.named_leaves(jax.grad(loss)(params))[0]
        weights = paths.named_leaves(params)[0]
        products = {
            path: jnp.sum(gradient**2) * jnp.sum(weights[path] ** 2)
            for path, gradient in gradients.items()
            if gradient.ndim > 1
        }
        return {
            layer: jnp.sqrt(sum(p for path, p in products.items() if path.startswith(f"{layer}/")))
            for layer in layers
        }

    found = jax.device_get(sizes(network.params))
    return {layer: float(found[layer]) for layer in layers}  # JAX returns dicts in the order of their names
