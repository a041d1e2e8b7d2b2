"""A network as StableHLO, which JAX runs without this library and without Flax.

    exported = jax.export.deserialize(bytearray(open("network.stablehlo", "rb").read()))
    outputs = exported.call(images)  # {"logits": ...}

The file is what `jax.export` serializes, with the weights inside, for any batch size, on CPUs, GPUs and TPUs.
A zip archive with the metadata follows it, which `jax.export` does not look at:
`unzip -p network.stablehlo metadata.json`. The metadata have a checksum of the program, so that damage is
noticed.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

from repopt_jax import extras
from repopt_jax.arguments import check_kind, check_path
from repopt_jax.export.checks import check_exportable
from repopt_jax.export.function import Call, any_batch_size, checked_call, file_function
from repopt_jax.export.metadata import Metadata
from repopt_jax.nn.convolution import xla_convolutions
from repopt_jax.surgery.modules import check_model
from repopt_jax.wholefile import whole_file

SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
METADATA = "metadata.json"
MAX_METADATA_BYTES = 2**22


class Program(NamedTuple):
    """What a file holds: the function, `program.exported.call(images)`, and the metadata."""

    exported: export.Exported
    metadata: Metadata


def to_stablehlo(
    model: nnx.Module, path: str | Path, metadata: Metadata, *, call: Call | None = None
) -> None:
    """Writes a network for `jax.export.deserialize`.

    The function in the file takes images (batch, *metadata.input_shape) of `metadata.dtype`, for any batch
    size, and returns a dict of arrays of the dtypes that the network has: "logits" (batch, classes) of a
    classifier; of a detector the fields of `Outputs` or, where `metadata.decoded`, of `Detections`; "output"
    of another network, or its outputs by the names or numbers that they have.

    Convolutions are XLA's: those of `nn.conv_general_dilated` for a CPU are chosen by the batch size.

    Args:
      model: plain (see `fuse`) and in evaluation mode; it takes images (batch, height, width, channels).
      path: a file of this name is replaced, once the new one is written.
      metadata: the input and the outputs of the function, and what else the file says.
      call: how a model is called that takes more than images, a function of the model and images:
        `lambda model, images: model(images, train=False)`.

    Raises:
      ValueError: a model in training mode, with branches, that takes more than images, or that takes the
        batch size as a number of Python, such as `len(images)`.
      ModuleNotFoundError: flatbuffers is not installed.
      OSError: the file cannot be written.
    """
    check_model(model)
    check_path("path", path)
    check_kind("metadata", metadata, Metadata, "a `Metadata`")
    extras.require("flatbuffers", by="a StableHLO file")
    check_exportable(model)
    function = file_function(model, metadata, checked_call(model, call))
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *metadata.input_shape), jnp.dtype(metadata.dtype))
    with xla_convolutions(), any_batch_size():
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(images)
    with whole_file(path) as file:
        file.write_bytes(_followed_by(metadata, bytes(exported.serialize())))


def read_stablehlo(path: str | Path) -> Program:
    """Reads a file that `to_stablehlo` wrote.

    Raises:
      OSError: it cannot be read.
      ValueError: another file, or a damaged one.
      ModuleNotFoundError: flatbuffers is not installed.
    """
    check_path("path", path)
    extras.require("flatbuffers", by="a StableHLO file")
    path = Path(path).expanduser()
    content = path.read_bytes()
    given = _metadata_of(content, path)
    program = content[: given.pop("program_bytes")]
    if hashlib.sha256(program).hexdigest() != given.pop("program_sha256"):
        raise ValueError(f"{path} is damaged: its program is not the one that was written; export it again")
    try:
        metadata = Metadata.from_strings(given)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; export it again") from error
    try:
        return Program(export.deserialize(bytearray(program)), metadata)
    except Exception as error:  # of another version of JAX: what it raises then is not said anywhere
        raise ValueError(
            f"{path} cannot be read by jax {jax.__version__} ({error}): export it again with this version"
        ) from error


def operations_of(exported: export.Exported) -> list[str]:
    """The operations of an exported program by name, as they are run: those of a function as often as it is
    called, and of alternatives, one for each platform, those of the first, the CPU."""
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import stablehlo

    def names(operation: Any) -> Iterator[str]:
        if operation.name == "func.call":
            operation = functions[ir.FlatSymbolRefAttr(operation.attributes["callee"]).value]
        kind, _, name = operation.name.partition(".")
        if kind == "stablehlo" and name not in ("return", "case"):  # which only hold others together
            yield name
        regions = list(operation.regions)
        for region in regions[:1] if name == "case" else regions:
            for block in region:
                for inner in block:
                    yield from names(inner.operation)

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        program = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        functions = {ir.StringAttr(op.attributes["sym_name"]).value: op.operation for op in program.body}
        return list(names(functions["main"]))


def _followed_by(metadata: Metadata, program: bytes) -> bytes:
    """The program, then a zip archive of the metadata."""
    checksum = hashlib.sha256(program).hexdigest()
    content = {**metadata.to_strings(), "program_bytes": len(program), "program_sha256": checksum}
    file = io.BytesIO(program)
    with zipfile.ZipFile(file, "a") as archive:
        # With its fixed date the same network gives the same file.
        archive.writestr(zipfile.ZipInfo(METADATA), json.dumps(content, indent=1))
    return file.getvalue()


def _metadata_of(content: bytes, path: Path) -> dict:
    """The entries of the archive at the end.

    Raises:
      ValueError: there is none, or a damaged one.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entry = archive.getinfo(METADATA)
            if entry.file_size > MAX_METADATA_BYTES:
                raise ValueError(f"{entry.file_size} bytes of metadata")
            given = json.loads(archive.read(entry))
        of_program = {"program_bytes": int, "program_sha256": str}
        if wrong := [n for n in given if not isinstance(given[n], of_program.get(n, str))]:
            raise ValueError(f"of another kind are {', '.join(wrong)}")
        if missing := of_program.keys() - given.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return given
    except Exception as error:  # a damaged archive makes `zipfile` raise nearly anything
        raise ValueError(
            f"{path} is no StableHLO file of this library, or a damaged one: the metadata at its end cannot "
            f"be read ({error})"
        ) from error
