"""Optional packages, and the error that says which extra of `repopt_jax` installs one that is missing.

`pip install repopt_jax` brings JAX, Optax and NumPy, on which `core` and `optim` stand: the transformation,
its rules and the descriptions of structures. Everything else comes with an extra.
"""

import importlib.util
import sys

# Extra -> what it installs, as it is imported, besides what the extras before it do.
PACKAGES = {
    "scales": ("orbax", "etils"),
    "flax": ("flax", "safetensors"),
    "train": ("PIL", "absl", "argcomplete", "grain", "ml_collections", "rich", "tensorflow_datasets"),
    "digits": ("sklearn",),
    "plots": ("matplotlib",),
    "tensorboard": ("tensorboardX",),
    "detect": ("pycocotools",),
    "export": ("flatbuffers", "onnx", "onnxruntime"),
    "wandb": ("wandb",),
    "torch": ("torch",),
}

# Extra -> the extras that it installs too.
INCLUDED = {
    "flax": ("scales",),
    "train": ("scales", "flax"),
    "export": ("scales", "flax"),
}

# Packages that several distributions share -> the module that is meant.
_NAMESPACES = {"orbax": "orbax.checkpoint"}

EXTRAS = {package: extra for extra, packages in PACKAGES.items() for package in packages}


def require(*packages: str, by: str) -> None:
    """Checks that packages are installed, without importing them.

    Args:
      packages: names as they are imported, of `EXTRAS`.
      by: what needs them, such as "repopt_jax.surgery", for the message.

    Raises:
      ModuleNotFoundError: one is not installed; with the command that installs all that are not. Its `name`
        is the first of them.
    """
    missing = [package for package in packages if not installed(package)]
    if missing:
        extras = dict.fromkeys(EXTRAS[package] for package in missing)
        included = {one for extra in extras for one in INCLUDED.get(extra, ())}
        names = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        raise ModuleNotFoundError(
            f"{by} needs {names}, which {'are' if len(missing) > 1 else 'is'} not installed: "
            f"pip install 'repopt_jax[{','.join(one for one in extras if one not in included)}]'",
            name=missing[0],
        )


def installed(package: str) -> bool:
    """Whether a package can be imported. None in `sys.modules` is Python's mark for one that cannot; a folder
    of its name without a module in it, such as `wandb/` of a run, is none."""
    if package in sys.modules:
        return sys.modules[package] is not None
    spec = importlib.util.find_spec(package)
    if spec is not None and package in _NAMESPACES:
        spec = importlib.util.find_spec(_NAMESPACES[package])
    return spec is not None and spec.origin is not None
