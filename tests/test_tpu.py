"""The training step compiled for TPU v5e of 16 and 256 chips: scales add their vectors to it, and nothing
else.

No TPU is used, but its compiler: `pip install 'repopt_jax[tpu-test]'`, then `pytest -m tpu`. `.ci/tpu` does
both in an environment of its own, because libtpu is large.
"""

import importlib.util

import pytest
from compiled_programs import Case, differences, facts_of

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: extra `tpu-test`"),
]

# Name -> fsdp of the meshes; 1 is data parallel only.
TPUS = {"v5e:4x4": (4, 1), "v5e:16x16": (16, 1)}
OPTIMIZERS = ("sgd", "adamw", "lion")
WRONG = {"scattered": "buffers", "stored": "memory", "divided": "collectives"}

# Reads of gradient, kernel and momentum, writes of the last two, in float32, for an element; measured 20.0000
# and, with scales, 20.02.
MOST_UPDATE_BYTES = 20.1


def _update(rule, optimizer="sgd"):
    return Case(rule, fsdp=4, optimizer=optimizer, network="wide", whole=False)


@pytest.fixture(scope="module")
def updates():
    cases = [_update(rule, name) for name in OPTIMIZERS for rule in ("plain", "repopt")]
    cases += [_update(rule) for rule in WRONG]
    return dict(zip(cases, facts_of("v5e:4x4", cases)))


@pytest.mark.parametrize(("tpu", "fsdp"), [(tpu, fsdp) for tpu, meshes in TPUS.items() for fsdp in meshes])
def test_scales_add_their_vectors_to_the_step_and_nothing_else(tpu, fsdp):
    plain, repopt = facts_of(tpu, [Case(rule, fsdp, network="wide") for rule in ("plain", "repopt")])
    assert differences(plain, repopt) == []
    assert any(key.startswith("all-reduce") for key in plain.collectives)
    assert repopt.update_bytes < MOST_UPDATE_BYTES * repopt.parameters


def test_statistics_of_each_device():
    plain, repopt = facts_of(
        "v5e:4x4", [Case(rule, 4, "device", network="wide") for rule in ("plain", "repopt")]
    )
    assert differences(plain, repopt) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_are_one_pass_and_move_nothing_between_chips(updates, optimizer):
    plain, repopt = updates[_update("plain", optimizer)], updates[_update("repopt", optimizer)]
    assert differences(plain, repopt) == []
    assert plain.collectives == repopt.collectives == {}
    assert repopt.writers <= len(repopt.reads)  # one fusion for each kernel, or fewer


@pytest.mark.parametrize("rule", WRONG)
def test_what_is_not_the_mask_is_found(updates, rule):
    plain, wrong = updates[_update("plain")], updates[_update(rule)]
    assert WRONG[rule] in {sentence.split(":")[0] for sentence in differences(plain, wrong)}
    if rule != "divided":  # 1.20 stored, 2.20 scattered, where 1.01 is allowed
        assert wrong.update_bytes > 1.19 * plain.update_bytes
