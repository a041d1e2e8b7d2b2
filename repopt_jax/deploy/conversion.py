"""Weights and scales between PyTorch's files and folders of ours."""

from pathlib import Path

from repopt_jax.arguments import check_path
from repopt_jax.core.scales import save_scales
from repopt_jax.deploy.network import load_any
from repopt_jax.interop import SCHEMES, load_torch_scales
from repopt_jax.interop.convert import convert_file, export_weights, is_torch_file, refuse_existing
from repopt_jax.interop.names import find_scheme
from repopt_jax.interop.networks import RECORD as CONVERTED
from repopt_jax.interop.networks import load_converted

SCALES = "scales"  # as `to`: the scales of a file, without its weights


def convert(
    source: str, out: str, *, model: str = "", classes: int = 0, key: str = "", to: str = ""
) -> tuple[str, ...]:
    """Converts `source` to `out` and returns a description of the result, line by line.

    | source | out | what |
    |---|---|---|
    | PyTorch or safetensors file | folder | a converted folder, which `interop.load_converted` reads |
    | the same | `.pth`, `.pt`, `.safetensors` | the same weights under the names of `to` |
    | the same, `to="scales"` | folder | the scales alone, as `load_scales` reads them |
    | our run, deployed or converted folder | `.pth`, `.pt`, `.safetensors` | its weights, names of `to` |

    Args:
      source, out: as above; nothing may be at `out`.
      model: the architecture of a file, such as "repopt-vgg-B1".
      classes: of a file's network; where it is given, the file must say the same.
      key: the entry of a checkpoint that holds the weights, as `interop.read_tensors` takes it.
      to: whose names PyTorch's keys are to be (a key of `interop.SCHEMES`), "" for the network's own
        authors'; or "scales".

    Raises:
      FileNotFoundError: nothing at `source`, or no folder for `out`.
      FileExistsError: something is at `out`.
      ValueError: what the file or the folder holds cannot be converted so.
    """
    check_path("source", source)
    check_path("out", out)
    refuse_existing(out)
    given, target = Path(source).expanduser(), Path(out).expanduser()
    if not given.exists():
        raise FileNotFoundError(f"no file or folder at {source}")
    # Everything that reading a large file would be in vain for.
    if not target.parent.is_dir():
        raise FileNotFoundError(f"`out` {out} is in no folder that exists: make {target.parent} first")
    if to and to != SCALES:
        find_scheme(to, "to")
    if given.is_dir():
        of_files = {"model": model, "classes": classes, "key": key, "to": to if to == SCALES else ""}
        if given_of_files := [f"`{name}`={value!r}" for name, value in of_files.items() if value]:
            raise ValueError(
                f"{source} is a folder of ours, which says itself what it holds: leave out "
                f"{', '.join(given_of_files)} (of files only); `to` may be {', '.join(SCHEMES)}"
            )
        if not is_torch_file(target):
            raise ValueError(f"{source} is a folder of ours: `out` must end in .safetensors, .pth or .pt")
        if (given / CONVERTED).is_file():
            return export_weights(target, load_converted(given), names=to).lines
        trained = load_any(given)
        return export_weights(target, trained.model, names=to, mode=trained.config.model.mode).lines
    if to == SCALES:
        if is_torch_file(target):
            raise ValueError(f"scales go into a folder of ours, not a file such as {out}")
        of_weights = {"model": model, "classes": classes}
        if useless := [f"`{name}`={value!r}" for name, value in of_weights.items() if value]:
            raise ValueError(f"{', '.join(useless)} does nothing with `to`='scales': leave it out")
        scales = load_torch_scales(given, key=key or None)
        save_scales(target, scales)
        vectors = sum(len(entry) for entry in scales.vectors.values())
        known = f" of {scales.metadata.architecture}" if scales.metadata.architecture else ""
        return (f"scales{known}: {vectors} vectors for {len(scales.entries)} layers",)
    if not model:
        raise ValueError(
            "`model` must name the file's architecture, such as repopt-vgg-B1 or repvgg-A0; of a file of "
            "scales alone, `to` must be scales"
        )
    return convert_file(given, target, model, classes=classes, key=key or None, names=to).lines
