"""Scales as a file and as a pytree: what is written comes back, and what does not fit is refused by name."""

import gc
import itertools
import json
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from orbax.checkpoint import v1 as ocp

from repopt_jax import (
    Average,
    BranchSet,
    Identity,
    Kernel,
    Scales,
    default_branches,
    load_scales,
    save_scales,
)
from repopt_jax.core.scales import LayerScales, ScalesMetadata, check_finite, check_fit

BRANCHES = {
    "stem/conv/kernel": default_branches((3, 3, 3, 4), stride=2),
    "stages/0/conv/kernel": default_branches((3, 3, 1, 4), groups=4),
    "stages/1/conv/kernel": BranchSet(
        (4, 2, 5, 5), (Kernel((5, 5)), Kernel((3, 3), (2, 2)), Kernel((1, 5)), Average()), 2, "oi..."
    ),
    "head/kernel": default_branches((4, 4)),
    "kernel": BranchSet((3, 2, 2), (Kernel((3,)), Identity())),
    "scanned/kernel": default_branches((2, 3, 4, 4), stacked=2),
}

METADATA = ScalesMetadata("B1", "cifar10", '{"epochs": 240}', 1234, "0.0.7")


def random_scales(branch_sets=BRANCHES, metadata=METADATA):
    rng = np.random.default_rng(0)
    entries = {
        path: LayerScales(
            bs, {n: jnp.asarray(rng.normal(size=bs.vector_shape), jnp.float32) for n in bs.names}
        )
        for path, bs in branch_sets.items()
    }
    return Scales(entries, metadata)


def assert_equal(a, b):
    """Of structure too, of which branch sets and metadata are part."""
    chex.assert_trees_all_equal(a, b, strict=True)
    chex.assert_trees_all_equal_dtypes(a, b)


def without(entries, *paths):
    return {path: entry for path, entry in entries.items() if path not in paths}


class TestFile:
    def test_round_trip(self, tmp_path):
        scales = random_scales()
        save_scales(tmp_path / "scales", scales)
        loaded = load_scales(str(tmp_path / "scales"), model=BRANCHES)
        assert_equal(loaded, scales)
        assert loaded.metadata == METADATA
        assert loaded.branch_sets == BRANCHES
        assert list(loaded.entries) == list(BRANCHES)

    def test_another_process_reads_it(self, tmp_path):
        """One device there, four here; nothing of this process's is in the file."""
        scales = random_scales()
        save_scales(tmp_path / "scales", scales)
        code = (
            "import json, sys; from repopt_jax import load_scales; s = load_scales(sys.argv[1]);"
            "print(json.dumps({p: {n: v.tolist() for n, v in d.items()} for p, d in s.vectors.items()}))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "scales")]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        values = {p: {n: v.tolist() for n, v in d.items()} for p, d in scales.vectors.items()}
        assert json.loads(run.stdout.splitlines()[-1]) == values

    def test_what_does_not_fit_is_listed_in_one_message(self, tmp_path):
        save_scales(tmp_path / "scales", random_scales())
        expected = without(BRANCHES, "kernel") | {
            "stem/conv/kernel": default_branches((3, 3, 3, 8), stride=2),
            "head/kernel": default_branches((7, 4)),
            "stages/2/conv/kernel": default_branches((3, 3, 4, 4)),
            "stages/3/conv/kernel": default_branches((3, 3, 4, 4)),
        }
        with pytest.raises(
            ValueError, match=r"the scales in .*scales \(searched on B1\) do not fit"
        ) as error:
            load_scales(tmp_path / "scales", model=expected)
        message = str(error.value)
        listed = "stages/2/conv/kernel (3, 3, 4, 4), stages/3/conv/kernel (3, 3, 4, 4)"
        assert f"2 missing layers: {listed}" in message
        assert "1 extra layers: kernel (3, 2, 2)" in message
        assert "2 misshapen layers: stem/conv/kernel (expected (3, 3, 3, 8), found (3, 3, 3, 4))" in message
        assert "head/kernel (expected (7, 4), found (4, 4))" in message
        assert "\n" not in message

    def test_values_that_are_not_numbers_are_neither_written_nor_read(self, tmp_path, monkeypatch):
        scales = random_scales()
        bad = scales.entries["stem/conv/kernel"].vectors
        bad["1x1"] = bad["1x1"].at[2].set(jnp.nan)
        scales.entries["kernel"].vectors["identity"] = jnp.array([jnp.inf, 1])
        named = "NaN or infinite values: stem/conv/kernel/1x1, kernel/identity"
        with pytest.raises(ValueError, match=f"the scales hold {named}"):
            save_scales(tmp_path / "scales", scales)
        assert not (tmp_path / "scales").exists()
        with monkeypatch.context() as patch:
            patch.setattr("repopt_jax.core.scales.check_finite", lambda scales: None)
            save_scales(tmp_path / "scales", scales)
        with pytest.raises(ValueError, match=f"the scales in .*scales hold {named}"):
            load_scales(tmp_path / "scales")

    def test_what_is_there_is_not_overwritten(self, tmp_path):
        save_scales(tmp_path / "scales", random_scales())
        ones = Scales.ones(BRANCHES)
        (tmp_path / "file").write_text("mine")
        for name in ("scales", "file"):
            with pytest.raises(FileExistsError, match=f"{name} exists: scales are not overwritten"):
                save_scales(tmp_path / name, ones)
        assert_equal(load_scales(tmp_path / "scales"), random_scales())
        assert (tmp_path / "file").read_text() == "mine"

    def test_what_is_no_scales_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no scales at .*nowhere"):
            load_scales(tmp_path / "nowhere")
        (tmp_path / "file").write_text("{}")
        (tmp_path / "folder").mkdir()
        for name in ("file", "folder"):
            with pytest.raises(ValueError, match=f"{name} is not a scales directory"):
                load_scales(tmp_path / name)
        ocp.save(tmp_path / "state", {"a": np.ones(2)}, custom_metadata={"epoch": 3})
        with pytest.raises(ValueError, match="state is an Orbax checkpoint, but not one of scales"):
            load_scales(tmp_path / "state")

    # TensorStore leaves tasks behind when several arrays fail at once; that is no fault of the caller's.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    def test_a_damaged_file_is_called_so(self, tmp_path):
        whole = tmp_path / "whole"
        save_scales(whole, random_scales({"kernel": BRANCHES["kernel"]}))
        (data,) = (whole / "state" / "d").iterdir()
        files = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", f"state/d/{data.name}")
        for damaged, cut in itertools.product(files, (False, True)):
            copy = tmp_path / f"{'cut' if cut else 'removed'} {damaged.replace('/', ' ')}"
            shutil.copytree(whole, copy)
            content = (copy / damaged).read_bytes()
            (copy / damaged).unlink()
            if cut:
                (copy / damaged).write_bytes(content[: len(content) // 2])
            reasons = r"is damaged or incomplete|not a scales directory|not one of scales"
            with pytest.raises(ValueError, match=reasons) as error:
                load_scales(copy)
            assert str(copy) in str(error.value)
            assert len(str(error.value)) < len(str(copy)) + 130  # one sentence, not Orbax's pages
            del error
        gc.collect()  # those tasks, here and not in whichever test comes later


class TestWithoutASearch:
    def test_ones(self):
        scales = Scales.ones(BRANCHES)
        assert {p: tuple(v) for p, v in scales.vectors.items()} == {p: b.names for p, b in BRANCHES.items()}
        for path, vectors in scales.vectors.items():
            for vector in vectors.values():
                assert vector.dtype == jnp.float32
                np.testing.assert_array_equal(vector, np.ones(BRANCHES[path].vector_shape))

    def test_depth_rule(self):
        """1 for the block that opens a stage, then sqrt(2 / l); the identity starts at 1 everywhere."""
        depths = dict(zip(BRANCHES, (0, 1, 2, 3, 8, 2)))
        scales = Scales.depth_rule(BRANCHES, depths)
        expected = dict(zip(BRANCHES, (1.0, 2**0.5, 1.0, (2 / 3) ** 0.5, 0.5, 1.0)))
        for path, vectors in scales.vectors.items():
            for name, vector in vectors.items():
                value = 1.0 if name == "identity" else expected[path]
                expected_vector = np.full(BRANCHES[path].vector_shape, value, np.float32)
                np.testing.assert_array_equal(vector, expected_vector)

    @pytest.mark.parametrize("kind", [list, np.asarray, tuple])
    def test_depth_rule_along_a_stack(self, kind):
        """One l for each layer of the stack: 1, sqrt(2), 1, sqrt(2/3), ... on all its channels."""
        branches = {"scanned": default_branches((2, 3, 4, 4), stacked=2)}
        vectors = Scales.depth_rule(branches, {"scanned": kind([[0, 1, 2], [3, 4, 8]])}).vectors["scanned"]
        expected = np.sqrt([[1, 2, 1], [2 / 3, 1 / 2, 1 / 4]])[..., None] * np.ones(4)
        np.testing.assert_allclose(vectors["dense"], expected, rtol=tolerances.FEW_OPERATIONS)
        np.testing.assert_array_equal(vectors["identity"], np.ones((2, 3, 4)))

    def test_depths_that_are_none(self):
        sets = {"a": BRANCHES["kernel"], "b": BRANCHES["scanned/kernel"], "c": BRANCHES["kernel"]}
        with pytest.raises(ValueError, match="`depths` must hold integers >= 0") as error:
            Scales.depth_rule(sets, {"a": -1, "b": [1, 2, 3], "c": 0.5})
        assert str(error.value).endswith(
            "not a (stack ()): -1; b (stack (2, 3)): [1, 2, 3]; c (stack ()): 0.5"
        )

    def test_depth_rule_needs_the_same_paths(self):
        with pytest.raises(ValueError, match="1 missing paths in `depths`: b; 1 extra paths in `depths`: c"):
            Scales.depth_rule(dict.fromkeys("ab", BRANCHES["kernel"]), {"a": 0, "c": 1})


class TestRename:
    def test_groups_dropping_and_what_no_rule_matches(self):
        """The first rule decides; order, branches, vectors and metadata stay."""
        scales = random_scales()
        renamed = scales.rename(
            {
                r"stages/1/(.*)": None,
                r"stages/(?P<stage>\d)/(.*)": r"body/\2/\g<stage>",
                r"h\w+/(.*)": r"heads/0/\1",
                r"stages/0/.*|kernel": "moved/kernel",
            }
        )
        moved = {
            "stem/conv/kernel": "stem/conv/kernel",
            "stages/0/conv/kernel": "body/conv/kernel/0",
            "head/kernel": "heads/0/kernel",
            "kernel": "moved/kernel",
            "scanned/kernel": "scanned/kernel",
        }
        assert list(renamed.entries) == list(moved.values())
        assert renamed.metadata == METADATA
        for old, new in moved.items():
            assert renamed.entries[new] is scales.entries[old]
        assert list(scales.entries) == list(BRANCHES)

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ({"heads/.*": "x", ".*kernel": r"\g<0>"}, "match none of the 6 paths: 'heads/.*'$"),
            ({"stem": None}, "match none of the 6 paths: 'stem'$"),  # whole paths
            (
                {".*": r"a/\g<0>", "kernel": "b", "x": "y"},
                r"none of the 6 paths: 'kernel' \(earlier rules take what it matches\), 'x'$",
            ),
            (
                {r"stages/\d/(.*)": r"\1", "head/kernel": "conv/kernel"},
                "path of several: 'conv/kernel' of stages/0/conv/kernel, stages/1/conv/kernel, head/kernel$",
            ),
            ({"head/kernel": "kernel"}, "one path of several: 'kernel' of head/kernel, kernel$"),
            ({"(stem": None}, r"`rules` holds '\(stem', which is no regular expression"),
            ({"stem/(.*)": r"\2"}, r"gives 'stem/\(\.\*\)' the replacement .*invalid group reference"),
            ({"stem/(.*)": r"\g<x>"}, "unknown group name 'x'"),
            (
                {"stem/.*": "", "head/(.*)": r"a//\1"},
                "empty part: '' of stem/conv/kernel, 'a//kernel' of head",
            ),
        ],
    )
    def test_mistakes_are_named(self, rules, message):
        with pytest.raises(ValueError, match=message):
            random_scales().rename(rules)


class TestFit:
    def test_a_tree_of_parameters_may_hold_more(self):
        params = {"kernel": jnp.ones((3, 2, 2)), "other": {"kernel": jnp.ones((5, 5))}}
        check_fit(random_scales({"kernel": BRANCHES["kernel"]}), params)
        with pytest.raises(ValueError, match=r"1 extra layers: elsewhere/kernel \(3, 2, 2\)$"):
            check_fit(random_scales({"elsewhere/kernel": BRANCHES["kernel"]}), params)

    def test_equal_kernels_with_other_branches_or_groups_do_not_fit(self):
        """The kernels' shapes agree: only the branches tell that the scales belong elsewhere."""
        model = {"a": default_branches((3, 3, 4, 4)), "b": default_branches((3, 3, 4, 8), groups=2)}
        other = {
            "a": default_branches((3, 3, 4, 4), stride=2),
            "b": BranchSet((3, 3, 4, 8), model["b"].branches[:2]),
        }
        with pytest.raises(ValueError, match="2 misshapen branch sets") as error:
            check_fit(random_scales(other, ScalesMetadata()), model)
        assert "a (expected ('3x3+1x1+identity', 1), found ('3x3+1x1', 1))" in str(error.value)
        assert "searched on" not in str(error.value)

    def test_stacked_kernels_fit_the_stacked_array(self):
        scales = random_scales({"k": default_branches((2, 3, 3, 4, 4), stacked=1)})
        check_fit(scales, {"k": jnp.ones((2, 3, 3, 4, 4))})
        with pytest.raises(
            ValueError, match=r"misshapen layers: k \(expected \(3, 3, 4, 4\), found \(2, 3, 3,"
        ):
            check_fit(scales, {"k": jnp.ones((3, 3, 4, 4))})
        of_one = jax.tree.map(lambda v: v[0], scales)
        with pytest.raises(ValueError, match=r"k/1x1 \(expected \(2, 4\), found \(4,\)\)"):
            check_fit(of_one, {"k": jnp.ones((2, 3, 3, 4, 4))})

    def test_a_stack_is_no_further_spatial_axis(self):
        """Equal shapes of kernels and vectors of one name: only the branch sets tell them apart."""
        sets = [BranchSet((2, 1, 4, 4), (Identity(),), stacked=n) for n in (1, 2)]
        message = (
            r"k \(expected \('identity', 1, 'stack \(2,\)'\), found \('identity', 1, 'stack \(2, 1\)'\)\)"
        )
        with pytest.raises(ValueError, match=message):
            check_fit(random_scales({"k": sets[1]}), {"k": sets[0]})


class TestPytree:
    def test_means_are_those_of_each_layer_of_a_stack(self):
        scales = random_scales()
        for path, vectors in scales.channel_means().vectors.items():
            for name, vector in vectors.items():
                v = np.asarray(scales.vectors[path][name], np.float64)
                expected = np.broadcast_to(v.mean(-1, keepdims=True), v.shape)
                close = tolerances.FEW_OPERATIONS
                np.testing.assert_allclose(vector, expected, rtol=close, atol=close)

    def test_map_keeps_branches_and_metadata(self):
        scales = random_scales()
        doubled = jax.tree.map(lambda v: 2 * v, scales)
        assert isinstance(doubled, Scales)
        assert doubled.branch_sets == BRANCHES
        assert doubled.metadata == METADATA
        np.testing.assert_array_equal(doubled.vectors["kernel"]["3"], 2 * scales.vectors["kernel"]["3"])
        assert len(jax.tree.leaves(scales)) == sum(len(b.branches) for b in BRANCHES.values())

    def test_argument_and_result_of_jit(self):
        """Also finiteness and fit, which must not look at values under a trace."""

        @jax.jit
        def halve(scales):
            check_finite(scales)
            check_fit(scales, BRANCHES)
            return jax.tree.map(lambda v: v / 2, scales)

        assert_equal(halve(random_scales()), jax.tree.map(lambda v: v / 2, random_scales()))
        halve(jax.tree.map(jnp.zeros_like, random_scales()))
        assert halve._cache_size() == 1

    def test_other_metadata_leaves_the_original(self):
        scales = random_scales()
        other = scales.with_metadata(step=7)
        assert (other.metadata.step, scales.metadata.step) == (7, 1234)
        assert other.metadata.dataset == "cifar10"


def test_scales_are_printed_by_their_means():
    sets = {path: BRANCHES[path] for path in ("stem/conv/kernel", "scanned/kernel")}
    scales = Scales.depth_rule(sets, {"stem/conv/kernel": 0, "scanned/kernel": 8}).with_metadata(
        architecture="B1"
    )
    lines = str(scales).splitlines()
    assert lines == [
        "scales of 2 layers of B1, means over the channels:",
        "  stem/conv/kernel: 3x3 1, 1x1 1",
        "  scanned/kernel: dense 0.5, identity 1",
    ]
    assert "identity" in str(jax.eval_shape(lambda: scales))
