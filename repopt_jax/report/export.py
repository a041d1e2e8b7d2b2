"""What exporting a network came to, as lines and as a page beside the file: FILE.html."""

import importlib.metadata
from collections.abc import Sequence
from html import escape
from pathlib import Path

from repopt_jax.deploy.exporting import Exported
from repopt_jax.export.runtime import ONNX
from repopt_jax.report import page
from repopt_jax.report.machine import processor
from repopt_jax.train.tasks import METRICS, format_metrics, metric_label

USE = """from repopt_jax.export.runtime import open_file

network = open_file({name!r})
image, ratio = network.prepare(pixels)  # uint8 (height, width, channels) of any size
{answer} = network.{method}(image[None])"""


def lines(done: Exported) -> list[str]:
    """What is printed of an export."""
    difference, int8 = done.difference, done.int8
    outputs = "detections" if done.metadata.decoded else "outputs"
    whose = "network" if int8 is None else "quantized network"
    found = [
        f"input:  {', '.join(map(str, done.inputs))}; {done.metadata.describe_input()}",
        f"output: {', '.join(map(str, done.outputs))}",
        f"largest difference of the {outputs} from the {whose}'s on {difference.count} test images: "
        f"{difference.max_abs:.2e} ({difference.max_rel:.2e} of the largest), the same class for "
        f"{difference.agreement:.2%}{'' if done.metadata.decoded else _parts(done)}",
    ]
    if int8 is None:
        return [*found, f"one image: {done.ms:.2f} ms, here and now"]
    task, count = done.metadata.task, int8.test["count"]
    return [
        *found,
        *([f"Ranges are of {int8.images} training images"] if int8.images else []),
        *([f"in float32: {', '.join(int8.kept)}"] if int8.kept else []),
        f"float32: {format_metrics(task, int8.float_test)} of {count} images, {int8.size:,} bytes",
        f"INT8:    {format_metrics(task, int8.test)} of {count} images, {done.size:,} bytes; "
        f"largest difference of the outputs {int8.difference.max_abs:.2e} "
        f"({int8.difference.max_rel:.2e} of the largest), the same class for "
        f"{int8.difference.agreement:.2%}{_parts(done)}",
        f"onnxruntime's fused integer kernels differ from the nodes as written by {int8.fused.max_abs:.2e} "
        f"({int8.fused.relative:.2e} of their span), the same class for "
        f"{int8.fused.agreement:.2%}{_parts(done)}",
        f"one image: {int8.float_ms:.2f} ms in float32, {done.ms:.2f} ms in INT8, here and now; INT8 is "
        "faster only on processors with instructions for it (VNNI, AMX, dot products of ARM)",
    ]


def _parts(done: Exported) -> str:
    return " of the locations" if done.metadata.task == "detect" else ""


def page_of(file: str | Path) -> Path:
    """Where the page of an exported file is."""
    file = Path(file)
    return file.with_name(f"{file.name}.html")


def write_page(done: Exported, *, source: str, command: str = "") -> Path:
    """Writes the page beside the file, and returns its path. It has no pictures and needs no Matplotlib.

    Args:
      done: what `deploy.export` returned.
      source: the run or deployment that was exported.
      command: the command that made the file.

    Raises:
      OSError: it cannot be written.
    """
    items = "".join(f"<li>{escape(line)}</li>" for line in lines(done))
    text = page.document(
        done.path.name,
        (
            f'<h1>{escape(done.path.name)}</h1>\n<p class="soft">{escape(source)}; {escape(_made_on())}</p>',
            page.section("Result", f'<div class="verdict"><ul>{items}</ul></div>', _task(done)),
            page.section("Differences", _differences(done)),
            page.section("File", _file(done)),
            page.section("Operations", _operations(done)),
            page.section("Use", _use(done), page.made_by(command)),
        ),
    )
    path = page_of(done.path)
    path.write_text(text, encoding="utf-8")
    return path


def _made_on() -> str:
    versions = []
    for name in ("repopt_jax", "jax", "onnx", "onnxruntime"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # StableHLO needs no onnx
            continue
    return f"{processor()}; {', '.join(versions)}"


def _task(done: Exported) -> str:
    """The numbers of the task, which are measured of INT8 only: others compute what the network does."""
    if done.int8 is None:
        return ""
    int8 = done.int8
    metrics = [m for m in METRICS[done.metadata.task] if int8.test.get(m.name) is not None]
    heads = ("", *(f"{metric_label(m)} (%)" for m in metrics), "file (bytes)", "one image (ms)")
    rows: list[Sequence[str]] = [
        (name, *(f"{100 * test[m.name]:.2f}" for m in metrics), f"{size:,}", f"{ms:.2f}")
        for name, test, size, ms in (
            ("float32", int8.float_test, int8.size, int8.float_ms),
            ("INT8", int8.test, done.size, done.ms),
        )
    ]
    return page.table(heads, rows)


def _differences(done: Exported) -> str:
    """How far outputs are from others, and what causes it."""
    network = "the network" if done.int8 is None else "the quantized network"
    rows = [
        (
            f"the file and<br> {network}",
            f"{done.difference.max_abs:.1e}",
            f"{done.difference.max_rel:.1e}",
            f"{100 * done.difference.agreement:.2f}",
            f"{done.difference.count:,}",
        )
    ]
    if done.int8 is not None:
        quantized, fused = done.int8.difference, done.int8.fused
        rows += [
            (
                "the INT8 file and<br> the float32 file",
                f"{quantized.max_abs:.1e}",
                f"{quantized.max_rel:.1e}",
                f"{100 * quantized.agreement:.2f}",
                f"{quantized.count:,}",
            ),
            (
                "fused integer kernels<br> and single nodes",
                f"{fused.max_abs:.1e}",
                f"{fused.relative:.1e} of the span",
                f"{100 * fused.agreement:.2f}",
                f"{fused.count:,}",
            ),
        ]
    heads = (
        "between",
        "largest",
        "relative to the largest output",
        f"same class{_parts(done) and ' of a location'} (%)",
        "test images",
    )
    runtime = "onnxruntime" if done.path.suffix == ONNX else "JAX"
    return f"<p>The file is run by {runtime} on this machine.</p>" + page.table(heads, rows)


def _file(done: Exported) -> str:
    data = done.metadata
    classes = ", ".join(data.class_names[:10]) + (" ..." if len(data.class_names) > 10 else "")
    rows: list[Sequence[str]] = [
        ("network", escape(f"{data.name}, {data.architecture}")),
        ("size", f"{done.size:,} bytes"),
        *(("input", escape(str(port))) for port in done.inputs),
        *(("output", escape(str(port))) for port in done.outputs),
        ("order of the input's axes", data.layout),
        ("images", escape(data.describe_input())),
        ("resized to", _resized(done)),
        ("classes", escape(f"{len(data.class_names)}: {classes}")),
        *([("keypoints", escape(", ".join(data.keypoint_names)))] if data.keypoint_names else []),
    ]
    if data.task == "detect":  # an image is fitted into the square as a whole
        rows = [row for row in rows if row[0] != "resized to"]
    return page.facts(rows)


def _resized(done: Exported) -> str:
    data = done.metadata
    cut = data.resize not in (None, data.image_size)
    return f"{data.resize} pixels, then cut to {data.image_size}" if cut else f"{data.image_size} pixels"


def _operations(done: Exported) -> str:
    count = sum(done.operations.values())
    rows = [(f"<code>{escape(name)}</code>", f"{number:,}") for name, number in done.operations.items()]
    return f"<p>The program in the file has {count:,} operations.</p>" + page.table(
        ("operation", "number"), rows
    )


def _use(done: Exported) -> str:
    answer, method = ("detections", "detect") if done.metadata.task == "detect" else ("logits", "logits")
    code = USE.format(name=done.path.name, answer=answer, method=method)
    return f"<pre>{escape(code)}</pre>"
