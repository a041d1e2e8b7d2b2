"""Mixup and CutMix: an image becomes a mixture of two, with two labels and the share of the first.

Row 2i of a batch is mixed with row 2i + 1. The order of the images is random, so that this is a random
partner, and a process needs no rows but its own. Both images of a pair are mixed, each with the other, in
the same proportion. (timm's `Mixup`, that the recipes name, mixes row i with the i-th from the end, by
default in the same proportion for the whole batch; its mode "pair" draws one for each pair, as here.)
"""

import numpy as np

from repopt_jax.data.chance import MIXING, generator


def mix(
    batch: dict[str, np.ndarray], seeds: np.ndarray, mixup: float, cutmix: float
) -> dict[str, np.ndarray]:
    """Mixes the images of each pair of rows by mixup or CutMix; where both are given, by one at random.

    mixup (arXiv:1710.09412, ICLR 2018): share * image + (1 - share) * other, share ~ Beta(mixup, mixup).
    CutMix (arXiv:1905.04899, ICCV 2019): a box of the image is the other's. Its centre is uniform and its
    sides are sqrt(1 - l) of the image's, l ~ Beta(cutmix, cutmix), where they lie in the image; the share is
    that of the pixels that are left.

    Args:
      batch: "image": float32 (rows, height, width, channels), rows even; it may be overwritten; "label":
        int32 (rows,).
      seeds: int64 (rows,); that of the first row of a pair is used.
      mixup: Beta parameter, 0: no mixup.
      cutmix: Beta parameter, 0: no CutMix.

    Returns:
      "image" and "label" as given, "other": int32 (rows,), label of the partner, "share": float32 (rows,), in
      [0, 1], how much of the image is its own: the loss is share * loss(label) + (1 - share) * loss(other).
    """
    images, labels = batch["image"], batch["label"]
    shares = np.empty(len(images), np.float32)
    for first in range(0, len(images), 2):
        pair = images[first : first + 2]
        shares[first : first + 2] = _mix_pair(pair, generator(seeds[first], MIXING), mixup, cutmix)
    other = labels.reshape(-1, 2)[:, ::-1].reshape(-1)
    return {"image": images, "label": labels, "other": other, "share": shares}


def _mix_pair(pair: np.ndarray, rng: np.random.Generator, mixup: float, cutmix: float) -> float:
    """Mixes two images in place; how much of each is its own."""
    if mixup and not (cutmix and rng.random() < 0.5):
        share = rng.beta(mixup, mixup)
        pair[:] = share * pair + (1 - share) * pair[::-1]
        return share
    top, bottom, left, right = random_box(pair.shape[1:3], rng.beta(cutmix, cutmix), rng)
    box = pair[:, top:bottom, left:right]
    box[:] = box[::-1].copy()
    height, width = pair.shape[1:3]
    return 1 - (bottom - top) * (right - left) / (height * width)


def random_box(shape: tuple[int, int], share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of CutMix's box in an image of which about `share` is to be left."""
    edges = []
    for length in shape:
        half = int(length * np.sqrt(1 - share)) // 2
        centre = int(rng.integers(length))
        edges += [max(0, centre - half), min(length, centre + half)]
    return edges[0], edges[1], edges[2], edges[3]
