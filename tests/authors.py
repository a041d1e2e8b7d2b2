"""The authors' released files of scales, where they are: REPOPT_TEST_DATA names the folder in which
`scales/RepOpt-VGG-B1-scales.pth` and so on lie. They are no part of the project."""

import functools
import os
from pathlib import Path

import pytest

from repopt_jax.core.scales import Scales
from repopt_jax.interop.scales import load_torch_scales


def scales_of(name: str) -> Scales:
    """The file's scales, such as those of "B1"; skips the test where it is not there."""
    folder = os.environ.get("REPOPT_TEST_DATA")
    if not folder:
        pytest.skip("REPOPT_TEST_DATA is not set: it names the folder of the authors' files")
    path = Path(folder) / "scales" / f"RepOpt-VGG-{name}-scales.pth"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return _read(path)


@functools.cache
def _read(path: Path) -> Scales:
    return load_torch_scales(path)
