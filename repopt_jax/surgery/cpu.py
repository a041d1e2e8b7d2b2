"""Networks of any origin with convolutions that are fast on a CPU."""

from flax import nnx
from jax import lax

from repopt_jax.nn.convolution import conv_general_dilated
from repopt_jax.surgery.modules import check_model, replace_modules


def fast_on_cpu(model: nnx.Module) -> nnx.Module:
    """Returns a copy of `model` whose `nnx.Conv` layers use `nn.conv_general_dilated` in place of XLA's.

    It computes the same, to rounding. On a CPU, grouped and depthwise convolutions and their gradients take a
    fraction of the time; on other devices the programs are the same to the last operation. Layers with a
    function of their own keep it. `fuse` makes layers with XLA's: call this once more after it.

        model = fast_on_cpu(MyNetwork(rngs=nnx.Rngs(0)))

    Raises:
      TypeError: modules in a container that cannot be rebuilt, as `prepare`.
    """
    check_model(model)

    def replace(path: str, module: nnx.Module) -> None:
        del path
        if isinstance(module, nnx.Conv) and module.conv_general_dilated is lax.conv_general_dilated:
            module.conv_general_dilated = conv_general_dilated  # of the copy

    return replace_modules(model, replace)
