"""Photographs made up for measuring, and what is measured on them."""

import numpy as np
import pytest
from PIL import Image

from repopt_jax.data import Transform, open_source
from repopt_jax.data.throughput import QUALITY, input_throughput, photograph, photographs

TRANSFORM = Transform(image_size=16, area=(0.08, 1.0), flip=True, randaugment=15, mixup=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photographs") / "made", 5, size=(60, 45))


def test_photographs_are_a_data_set(folder):
    source = open_source("folder", data_dir=folder)
    assert (source.info.num_train, source.info.num_eval) == (5, 2)
    assert source.info.image_shape == (45, 60, 3)
    assert len({example["image"].tobytes() for example in source.train}) == 5
    with pytest.raises(FileExistsError):
        photographs(folder, 2)


def test_a_photograph_takes_the_bytes_of_one_in_imagenet(tmp_path):
    """About 110 kB at 500 x 375; a smooth image or plain noise would be far from it."""
    made = photograph((500, 375), np.random.default_rng(0))
    paths = [tmp_path / f"{name}.jpg" for name in ("made", "smooth", "noise")]
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    for path, image in zip(
        paths, (made, made.reduce(8).resize(made.size), Image.fromarray(noise)), strict=True
    ):
        image.save(path, quality=QUALITY)
    sizes = [path.stat().st_size for path in paths]
    assert 90e3 < sizes[0] < 130e3
    assert sizes[1] < sizes[0] / 2.5
    assert sizes[2] > 2 * sizes[0]


def test_throughput_counts_images_and_where_the_time_goes(folder):
    source = open_source("folder", data_dir=folder)
    found = input_throughput(source, TRANSFORM, batch_size=4, images=10)
    assert found.keys() == {"images", "images_per_s", "wall_images_per_s", "decode_ms", "augment_ms"}
    assert found["images"] == 12
    assert all(value > 0 for value in found.values())
    assert found["images_per_s"] == pytest.approx(1e3 / (found["decode_ms"] + found["augment_ms"]))
    assert not source.cache


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda source: input_throughput(source, TRANSFORM, batch_size=4, images=0), "`images` is 0"),
        (lambda source: input_throughput(source, TRANSFORM, batch_size=3, images=3), "it must be an even"),
        (lambda _: photographs("unused", 1), r"`count` is 1 and `size` \(500, 375\); they must be"),
        (lambda _: photographs("unused", 4, size=(0, 5)), r"`size` \(0, 5\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, call, message):
    with pytest.raises(ValueError, match=message):
        call(open_source("folder", data_dir=folder))
