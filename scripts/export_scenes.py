"""Trains the detector of the scenes, exports it in float32 and INT8, and measures the files by onnxruntime.

    python scripts/export_scenes.py OUT              # about six minutes on 2 CPU cores

OUT keeps the run and the files; a finished run is not trained again. Writes RESULTS.md, and RESULTS.png, what
`predict` draws from the INT8 file on test images (`--results`, by default scripts/results/export_scenes).

By hand, the first of the INT8 files:

    repopt train --config=scenes:plain --out=OUT/run
    repopt export --run=OUT/run --format=onnx-int8 --out=OUT/int8.onnx
    repopt predict PICTURE.png --model=OUT/int8.onnx
"""

import argparse
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from PIL import Image

from repopt_jax import data, deploy, train
from repopt_jax.deploy import Exported, export
from repopt_jax.deploy.exporting import CALIBRATION_IMAGES
from repopt_jax.detection import contact_sheet
from repopt_jax.export.runtime import open_file
from repopt_jax.report.gallery import predict
from repopt_jax.report.machine import processor

# File -> what it is, and arguments of `export` besides the format.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("INT8, last layers of the head in float32", {}),
    "int8_full": ("the same, weights to 127", {"weights": "full"}),
    "int8_all": ("INT8, all layers", {"keep_float": ()}),
    "int8_all_full": ("the same, weights to 127", {"keep_float": (), "weights": "full"}),
}
METRICS = ("ap50", "ap", "keypoint_ap50", "keypoint_ap")
PICTURES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--results", type=Path, default=Path("scripts/results/export_scenes"))
    args = parser.parse_args()
    train.run(train.load_config("scenes:plain"), args.out / "run")
    (args.out / "files").mkdir(exist_ok=True)
    done = {}
    for name, (row, options) in FILES.items():
        path = args.out / "files" / f"{name}.onnx"
        path.unlink(missing_ok=True)
        done[name] = export(args.out / "run", path, format="onnx-int8", **options)
        print(row, done[name].int8.test)
    network = deploy.load_plain(args.out / "run")
    Path(f"{args.results}.md").write_text(markdown(deploy.evaluate(network), done))
    draw(network, done["int8"].path, Path(f"{args.results}.png"))
    print(f"Written: {args.results}.md and {args.results}.png")


def markdown(trained: dict[str, Any], done: dict[str, Exported]) -> str:
    packages = ("repopt_jax", "jax", "flax", "onnx", "onnxruntime", "pycocotools")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    first = done["int8"].int8
    lines = [
        "# A detector in INT8",
        "",
        "`python scripts/export_scenes.py OUT`",
        "",
        f"{processor()}, shared with other programs; Python {platform.python_version()}, {versions}. "
        f"`configs/scenes.py:plain`, seed 0, fused; {trained['count']} test scenes; average precision by "
        f"COCO's own evaluation, in %. Ranges of inputs by `quantize` with {CALIBRATION_IMAGES} training "
        "images, weights per output channel. ONNX files as onnxruntime runs them on the CPU with its default "
        "settings, decoded on the host.",
        "",
        "| | AP50 | AP | keypoint AP50 | keypoint AP | same class as float32, of locations | fused against "
        "unfused kernels | bytes | ms an image |",
        "|---|---|---|---|---|---|---|---|---|",
        _row("fused network in JAX", trained, "", "", "", ""),
        _row("ONNX, float32", first.float_test, "", "", f"{first.size:,}", f"{first.float_ms:.2f}"),
    ]
    for name, (row, _) in FILES.items():
        one = done[name]
        fused = f"{one.int8.fused.relative:.1e} of the span, {one.int8.fused.agreement:.2%} the same class"
        agreement = f"{one.int8.difference.agreement:.2%}"
        lines.append(_row(row, one.int8.test, agreement, fused, f"{one.size:,}", f"{one.ms:.2f}"))
    kept = ", ".join(f"`{path}`" for path in first.kept)
    lines += [
        "",
        f"In float32: {kept}. Largest difference of the fused kernels is that of the class logits. The time "
        "is the median of 30 runs with one image, while other programs run: it says nothing about another "
        "processor.",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, test: dict[str, Any], *others: str) -> str:
    values = [f"{100 * test[metric]:.2f}" for metric in METRICS]
    return f"| {' | '.join([name, *values, *others])} |"


def draw(network: Any, path: Path, out: Path) -> None:
    """Draws what the file finds on the first test images, as `repopt predict` does."""
    file, settings = open_file(path), network.config.data
    counts = dict(zip(("num_train", "num_eval"), settings.scenes))
    source = data.open_scenes(settings.scenes_seed, size=settings.image_size, **counts)
    drawings = []
    for i in range(PICTURES):
        picture, drawn = path.with_name(f"{i}.png"), path.with_name(f"{i}-detected.png")
        Image.fromarray(source.eval[i]["image"][..., 0]).save(picture)
        predict(file, picture, drawn)
        with Image.open(drawn) as image:
            drawings.append(image.convert("RGB"))
    contact_sheet(drawings, columns=6).save(out)


if __name__ == "__main__":
    main()
