"""What every exporter asks of a model: that it is plain and computes what it will compute when it is used."""

from flax import nnx

from repopt_jax.core import paths
from repopt_jax.nn.branched import StructuredLayer
from repopt_jax.nn.compactor import Compactor
from repopt_jax.surgery.modules import is_training, named_modules


def check_exportable(model: nnx.Module) -> None:
    """Raises ValueError, with paths and classes, if a model is not fused or not in evaluation mode."""
    modules = {f"{p} ({type(m).__name__})": m for p, m in named_modules(model)}
    training = [p for p, m in modules.items() if is_training(m)]
    branches = [p for p, m in modules.items() if isinstance(m, (StructuredLayer, Compactor))]
    problems = []
    if training:
        problems.append(f"{paths.listed(training)} are in training mode: call `model.eval()` first")
    if branches:
        problems.append(f"{paths.listed(branches)} have branches: export `fuse(model)`")
    if problems:
        raise ValueError(f"the model cannot be exported as it is: {'; '.join(problems)}")
