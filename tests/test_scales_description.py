"""What `save_scales` writes beside the arrays, changed in any way: refused with the file, before memory is
taken for it."""

import json
import resource
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repopt_jax import BranchSet, Identity, Kernel, Scales, default_branches, load_scales, save_scales
from repopt_jax.core.scales import LayerScales, ScalesMetadata

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


def places_in(value, place=()):
    """The place of every value inside a JSON value, by keys and indices."""
    yield place
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(inner, (*place, key))


def with_value(value, place, new):
    """A copy of a JSON value with another value, or none (`new` is ...), at this place."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(place) == 1 and new is ...:
        del copy[place[0]]
    else:
        copy[place[0]] = with_value(value[place[0]], place[1:], new)
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("described") / "scales"
    sets = {
        "stem/conv/kernel": default_branches((3, 3, 3, 4), stride=2),
        "kernel": BranchSet((3, 2, 2), (Kernel((3,)), Identity())),
    }
    rng = np.random.default_rng(0)
    entries = {
        path: LayerScales(
            bs, {n: jnp.asarray(rng.normal(size=bs.vector_shape), jnp.float32) for n in bs.names}
        )
        for path, bs in sets.items()
    }
    save_scales(folder, Scales(entries, ScalesMetadata("B1", "cifar10", '{"epochs": 240}', 1234, "0.0.7")))
    return folder


def described(folder):
    """The description, with the branch sets as values and not as texts."""
    stored = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    description = json.loads(stored["custom_metadata"]["repopt_scales"])
    sets = {path: json.loads(text) for path, text in description["branch_sets"].items()}
    return stored, {**description, "branch_sets": sets}


def write(folder, tmp_path, description):
    stored, _ = described(folder)
    if isinstance(description, dict) and isinstance(sets := description.get("branch_sets"), dict):
        texts = {path: json.dumps(value) for path, value in sets.items()}
        description = {**description, "branch_sets": texts}
    stored["custom_metadata"]["repopt_scales"] = json.dumps(description)
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / "_CHECKPOINT_METADATA").write_text(json.dumps(stored))
    return copy


def test_a_copy_is_read(folder, tmp_path):
    """The control."""
    copy = write(folder, tmp_path, described(folder)[1])
    found, expected = load_scales(copy), load_scales(folder)
    assert (found.metadata, found.branch_sets) == (expected.metadata, expected.branch_sets)
    jax.tree.map(np.testing.assert_array_equal, found.vectors, expected.vectors)


@pytest.mark.parametrize(
    "kernel", [[3, 3, 3, 2_000_000_000], [3, 3, 3, 2**40], [2_000_000_000, 3, 3, 4], [3, 3, 3, 5], [4]]
)
def test_shapes_are_looked_at_before_memory_is_taken(folder, tmp_path, kernel):
    _, description = described(folder)
    changed = with_value(description, ("branch_sets", "stem/conv/kernel", "kernel"), kernel)
    copy = write(folder, tmp_path, changed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is damaged") as error:
            load_scales(copy)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB
    assert "\n" not in str(error.value)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_change_is_refused_with_the_file_or_means_the_same(folder, tmp_path_factory, data):
    """One value anywhere in it is another one or missing."""
    _, description = described(folder)
    place = data.draw(st.sampled_from([place for place in places_in(description) if place]))
    new = data.draw(JSON | st.just(...) | st.sampled_from([0, -1, 1.5, "3", [], {}, True, 2**31, 10**30]))
    copy = write(folder, tmp_path_factory.getbasetemp(), with_value(description, place, new))
    try:
        loaded = load_scales(copy)
    except ValueError as error:
        if str(copy) not in str(error):
            raise
        return
    # Texts about where they come from, groups and the like may be others; the vectors are those.
    original = load_scales(folder)
    assert loaded.vectors.keys() == original.vectors.keys()
    jax.tree.map(np.testing.assert_array_equal, loaded.vectors, original.vectors)
