"""Pictures of detections: boxes with their class and score, keypoints as dots."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from repopt_jax.arguments import check_array, check_count, check_items, check_kind

# Colours that can be distinguished on dark and on light images, also with colour blindness: those of Okabe
# and Ito without black, and three lighter ones of Paul Tol. Class `c` is drawn in COLOURS[c % 10], and so is
# keypoint `c`.
COLOURS = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#cc79a7",
    "#d55e00",
    "#0072b2",
    "#bbcc33",
    "#ffaabb",
    "#99ddff",
)
DARK, LIGHT = "#101010", "#ffffff"
# Sizes in the drawing: the least number of pixels, and the share of the shorter side.
TEXT, TEXT_SHARE = 12, 1 / 50
DOT, DOT_SHARE = 3, 1 / 150
LINE, LINE_SHARE = 2, 1 / 300


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None,
    keypoints: np.ndarray | None,
    class_names: Sequence[str],
    *,
    zoom: int = 1,
) -> Image.Image:
    """Draws each object of one image: its box with class and score, and its keypoints.

    Args:
      image: uint8 (height, width, 1 or 3).
      boxes: (n, 4) x1, y1, x2, y2 in pixels of `image`.
      classes: int (n,); objects of class -1 are left out.
      scores: (n,) in [0, 1]; None to write no scores, as for the ground truth.
      keypoints: (n, K, 2) x, y, or (n, K, 3) with a flag: 0 (not drawn), 1 (hidden: a ring) or 2 (a dot);
        None for none. Each keypoint has a colour of its own.
      class_names: the text for each class.
      zoom: side in pixels of the square that each pixel of `image` becomes; lines stay thin. For small
        images.

    Returns:
      An RGB image, `zoom` times as large.

    Raises:
      ValueError: `image` is not an image, or `zoom` is not positive.
    """
    check_array("image", image)
    check_array("boxes", boxes)
    check_array("classes", classes)
    for name, value in (("scores", scores), ("keypoints", keypoints)):
        if value is not None:
            check_array(name, value)
    check_kind("class_names", class_names, (list, tuple), "the names of the classes, in a list")
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"`image` is {image.dtype} {image.shape}; it must be uint8 (height, width, 1 or 3 channels)"
        )
    if zoom < 1:
        raise ValueError(f"`zoom` is {zoom}; it must be at least 1")
    drawing = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)).copy())
    drawing = drawing.resize((drawing.width * zoom, drawing.height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(drawing)
    labels: list[int] = np.asarray(classes).tolist()
    shorter = min(drawing.size)
    line = max(LINE, round(shorter * LINE_SHARE))
    radius = max(DOT, round(shorter * DOT_SHARE))
    font = ImageFont.load_default(max(TEXT, round(shorter * TEXT_SHARE)))
    # The best detections come first and are drawn last; labels lie above all boxes, and dots above labels.
    order = [i for i in range(len(labels)) if labels[i] >= 0][::-1]
    for i in order:
        draw.rectangle([v * zoom for v in boxes[i].tolist()], outline=_colour(labels[i]), width=line)
    for i in order:
        score = "" if scores is None else f" {scores[i]:.2f}"
        text = f"{class_names[labels[i]]}{score}"
        _label(draw, boxes[i] * zoom, text, font, _colour(labels[i]), drawing.size)
    points = np.zeros((len(labels), 0, 2)) if keypoints is None else keypoints
    for i in order:
        for k, point in enumerate(points[i]):
            _dot(draw, point[:2] * zoom, radius, _colour(k), point[2] if len(point) > 2 else 2)
    return drawing


def contact_sheet(
    images: Sequence[Image.Image], columns: int, *, gap: int = 6, background: str = LIGHT
) -> Image.Image:
    """Arranges images in rows of `columns`, each in a cell of the size of the largest.

    Raises:
      ValueError: no images, or `columns` is not positive.
    """
    check_items("images", images, "images")
    check_count("columns", columns)
    if not images:
        raise ValueError("`images` is empty; give at least one")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = (max(image.size[axis] for image in images) + gap for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), background)
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def _label(draw, box: np.ndarray, text: str, font, colour: str, size: tuple[int, int]) -> None:
    """Writes a label above the box, below it where there is no room above, or else in its upper corner."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(0, box[0]), max(0, size[0] - width))
    y = max(0, box[1])
    if box[1] >= height:
        y = box[1] - height
    elif box[3] + height < size[1]:
        y = box[3]
    draw.rectangle([x, y, x + width, y + height], fill=colour)
    draw.text((x + 2 - left, y + 2 - top), text, fill=_ink(colour), font=font)


def _dot(draw, point: np.ndarray, radius: int, colour: str, flag: float) -> None:
    if not flag:
        return
    x, y = point.tolist()
    bounds = [x - radius - 1, y - radius - 1, x + radius + 1, y + radius + 1]
    if flag == 1:
        draw.ellipse(bounds, outline=colour, width=2)
    else:
        draw.ellipse(bounds, fill=colour, outline=DARK)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _ink(colour: str) -> str:
    """The colour of text that is readable on `colour`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return DARK if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else LIGHT
