"""A network as an ONNX file, in floating point or, of a quantized network, with INT8 kernels.

    session = onnxruntime.InferenceSession("network.onnx")
    (logits,) = session.run(None, {"images": images})

A quantized network becomes QuantizeLinear and DequantizeLinear around floating point operations, which is
what TensorRT and onnxruntime turn into integer kernels. Every node is named for the module that it is of,
`stages/1/0/conv/Conv`. The metadata are entries of the file's `metadata_props`, and so is a checksum of the
file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from repopt_jax import extras
from repopt_jax.arguments import check_array, check_kind, check_path
from repopt_jax.core import paths
from repopt_jax.export.checks import check_exportable
from repopt_jax.export.checksum import CHECKSUM, NO_DIGITS, with_checksum
from repopt_jax.export.function import INPUT, Call, checked_call, file_function, named_outputs
from repopt_jax.export.graph import BATCH, DTYPES, Graph, Unsupported, path_of, trace
from repopt_jax.export.metadata import LAYOUTS, Metadata
from repopt_jax.export.operations import OPERATIONS
from repopt_jax.export.runtime import open_onnx
from repopt_jax.export.tensors import Node, Writer
from repopt_jax.surgery.modules import check_model
from repopt_jax.wholefile import whole_file

OPSET = 17
IR_VERSION = 8
# Protocol buffers, and so ONNX files in one piece, are no larger.
MAX_BYTES = 2**31 - 1


def to_onnx(model: nnx.Module, path: str | Path, metadata: Metadata, *, call: Call | None = None) -> None:
    """Writes a network as an ONNX file for any batch size.

    The graph has the input "images", (batch, *metadata.input_shape) of `metadata.dtype`, and the outputs
    "logits" (batch, classes) of a classifier, the fields of `Outputs` of a detector, "output" of another
    network, or its outputs by the names or numbers that they have. Maps among the outputs have the order of
    axes that the network gives them.

    Args:
      model: plain (see `fuse`), in evaluation mode, with parameters in float32; in floating point or from
        `quantize`. It takes images (batch, height, width, channels).
      path: a file of this name is replaced, once the new one is written.
      metadata: the input and the outputs of the graph, and what else the file says.
      call: how a model is called that takes more than images, a function of the model and images:
        `lambda model, images: model(images, train=False)`.

    Raises:
      ValueError: a model in training mode, with branches, or with parameters of another dtype; one that takes
        more than images, or the batch size as a number of Python, such as `len(images)`; metadata with
        `decoded`; operations that have no ONNX form, all of them with path and class; more than 2 GiB.
      ModuleNotFoundError: onnx is not installed.
      OSError: the file cannot be written.
    """
    check_model(model)
    check_path("path", path)
    check_kind("metadata", metadata, Metadata, "a `Metadata`")
    if metadata.decoded:
        raise ValueError(
            "`metadata.decoded` is True: an ONNX file gives a detector's raw outputs, as the sorting and "
            "suppression of boxes differ between runtimes; decode with `open_file(path).detect`, or export "
            "to StableHLO"
        )

    call = checked_call(model, call)

    def function(model: nnx.Module) -> Callable[[jax.Array], dict[str, jax.Array]]:
        return file_function(model, metadata, call)

    proto = _proto(
        model, function, metadata.input_shape, metadata.dtype, metadata.to_strings() | {CHECKSUM: NO_DIGITS}
    )
    with whole_file(path) as file:
        file.write_bytes(with_checksum(proto.SerializeToString()))


def onnx_model(
    model: nnx.Module,
    input_shape: tuple[int, ...],
    *,
    layout: str = "NHWC",
    metadata: Mapping[str, str] | None = None,
    call: Call | None = None,
) -> Any:
    """Returns a network as an `onnx.ModelProto`: `to_onnx` for inputs of any rank, without its metadata.

    Args:
      model: as for `to_onnx`.
      input_shape: of the network's input without the batch, channels last.
      layout: "NCHW" for a graph whose input is channels first.
      metadata: text by name, for `metadata_props`.
      call: as for `to_onnx`.

    Raises:
      ValueError, ModuleNotFoundError: as `to_onnx`; a layout that is neither.
    """
    check_model(model)
    check_kind("input_shape", input_shape, (tuple, list), "the shape of one image")
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` is {layout!r}: it must be one of {', '.join(LAYOUTS)}")
    first = layout == "NCHW"
    call = checked_call(model, call)

    def function(model: nnx.Module) -> Callable[[jax.Array], dict[str, jax.Array]]:
        return lambda x: named_outputs(call(model, jax.numpy.moveaxis(x, 1, -1) if first else x))

    *spatial, channels = input_shape
    shape = (channels, *spatial) if first else tuple(input_shape)
    return _proto(model, function, shape, "float32", metadata or {})


def _proto(
    model: nnx.Module,
    function: Callable[[nnx.Module], Callable[[jax.Array], dict[str, jax.Array]]],
    shape: tuple[int, ...],
    dtype: str,
    metadata: Mapping[str, str],
) -> Any:
    extras.require("onnx", by="an ONNX file")
    check_exportable(model)
    _check_dtypes(model)
    graph = trace(model, function, shape, np.dtype(dtype))
    return _encoded(graph, *written(graph), metadata)


def _check_dtypes(model: nnx.Module) -> None:
    leaves = paths.named_leaves(nnx.state(model, nnx.Param))[0]
    others = [f"{path} ({leaf.dtype})" for path, leaf in leaves.items() if leaf.dtype != np.float32]
    if others:
        raise ValueError(
            f"the parameters {paths.listed(others, 8)} are not float32, as ONNX files of this library are: "
            "`nnx.update(model, jax.tree.map(lambda p: p.astype('float32'), nnx.state(model, nnx.Param)))`"
        )


# -- from the graph to nodes


def written(graph: Graph) -> tuple[Writer, dict[str, str]]:
    """Writes the nodes of a graph; also returns the names of the stored outputs by the outputs' names.

    Raises:
      ValueError: equations that have no ONNX form, all of them.
    """
    w = Writer(graph)
    w.start(INPUT)
    problems: dict[str, None] = {}
    for equation in graph.equations:
        w.path = path_of(equation)
        try:
            form = _form_of(equation)
            ready = all(v in w.tensors or v in graph.constants for v in equation.inputs)
            if all(v in w.tensors for v in equation.outputs) or not ready:
                continue  # written with an earlier one, or in want of one that has no form
            tensors = form(w, equation)
        except Unsupported as error:
            problems[f"{graph.place(equation)}: {equation.name} ({error})"] = None
            continue
        tensors = tensors if isinstance(tensors, list) else [tensors]
        w.tensors |= dict(zip(equation.outputs, tensors, strict=True))
    if problems:
        raise ValueError(f"the network has operations without an ONNX form: {'; '.join(problems)}")
    w.path = ""
    outputs = {}
    for name, value in graph.outputs.items():
        t = w.arranged(w.whole(value), tuple(range(len(value.shape))))
        outputs[name] = w.name(t)
    return w, outputs


def _form_of(equation: Any) -> Any:
    if equation.name not in OPERATIONS:
        raise Unsupported("not known to the exporter")
    others = {str(v.aval.dtype) for v in equation.outputs} - set(DTYPES)
    if others:
        raise Unsupported(f"computed in {', '.join(sorted(others))}; build the network with dtype=float32")
    return OPERATIONS[equation.name]


def needed(nodes: list[Node], outputs: list[str]) -> list[Node]:
    """Returns the nodes that the outputs need."""
    names, kept = set(outputs), []
    for node in reversed(nodes):
        if names.intersection(node.outputs):
            kept.append(node)
            names.update(node.inputs)
    return kept[::-1]


# -- from nodes to the format


def _encoded(graph: Graph, w: Writer, outputs: Mapping[str, str], metadata: Mapping[str, str]) -> Any:
    """Returns the `onnx.ModelProto`, checked."""
    import onnx
    from onnx import helper, numpy_helper

    def info(name: str, value: Any) -> Any:
        dims = [n if not n or n % BATCH else _symbol(n // BATCH) for n in graph.sizes(value.shape)]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.aval.dtype), dims)

    def attributes(node: Node) -> dict[str, Any]:
        kinds = {k: v for k, v in node.attributes.items() if isinstance(v, np.dtype)}
        return node.attributes | {k: helper.np_dtype_to_tensor_dtype(v) for k, v in kinds.items()}

    nodes = needed([*w.initial, *w.nodes], list(outputs.values()))
    # A node's output that is one of the network's has its name; others, or a second name, are copied.
    renamed: dict[str, str] = {}
    made = {name for node in nodes for name in node.outputs}
    for name, stored in outputs.items():
        if stored in made and stored not in renamed:
            renamed[stored] = name
        else:
            nodes.append(Node("Identity", (stored,), (name,), f"{name}/Identity", {}))
    used = {name for node in nodes for name in node.inputs}
    proto = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(
                    node.op,
                    [renamed.get(name, name) for name in node.inputs],
                    [renamed.get(name, name) for name in node.outputs],
                    name=node.name,
                    **attributes(node),
                )
                for node in nodes
            ],
            "network",
            [info(INPUT, graph.inputs[0])],
            [info(name, value) for name, value in graph.outputs.items()],
            [
                numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
                for name, array in w.constants.items()
                if name in used
            ],
        ),
        producer_name="repopt_jax",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    helper.set_model_props(proto, dict(metadata))
    if proto.ByteSize() > MAX_BYTES:
        raise ValueError(
            f"the file would have {proto.ByteSize()} bytes, and an ONNX file in one piece has at most "
            f"{MAX_BYTES}: export to StableHLO"
        )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _symbol(times: int) -> str:
    return "batch" if times == 1 else f"{times}*batch"


# -- what onnxruntime makes of a file


@dataclasses.dataclass(frozen=True)
class FusedDifference:
    """How far onnxruntime's fused kernels are from the file's own nodes, one after the other.

    Attributes:
      max_abs: largest difference in the output in which it is the largest part of the span.
      span: of that output, largest minus smallest.
      agreement: share of images (of a detector: of locations) with the same largest number in the first
        output.
      count: number of images.
    """

    max_abs: float
    span: float
    agreement: float
    count: int

    @property
    def relative(self) -> float:
        """`max_abs` over `span`."""
        return self.max_abs / self.span if self.span else self.max_abs


def compare_fused(path: str | Path, images: np.ndarray) -> FusedDifference:
    """Runs an ONNX file on this machine with onnxruntime's optimizations and without, and compares.

    INT8 kernels of full range overflow on x86 processors without VNNI, which shows here and nowhere else.

    Args:
      path: a file of `to_onnx`.
      images: as `FileNetwork` takes them.

    Raises:
      ValueError, ModuleNotFoundError: as `open_file`; no images.
      TypeError: as `FileNetwork`.
    """
    check_path("path", path)
    check_array("images", images)
    if not np.size(images):
        raise ValueError(f"`images` is of shape {images.shape}: there is none to compare with")
    fused, plain = (open_onnx(path, optimized=optimized)(images) for optimized in (True, False))
    first, *_ = plain
    differences = [
        FusedDifference(
            max_abs=float(np.abs(one - other).max()),
            span=float(other.max() - other.min()),
            agreement=float(np.mean(fused[first].argmax(-1) == plain[first].argmax(-1))),
            count=len(images),
        )
        for one, other in ((np.float64(fused[name]), np.float64(plain[name])) for name in plain)
        if other.size
    ]
    return max(differences, key=lambda difference: difference.relative)
