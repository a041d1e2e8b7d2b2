"""The table of networks: what it says is what the networks are, on the command line and on its page."""

import dataclasses
import json

import jax
import numpy as np
import programs
import pytest
from flax import nnx
from networks import count, deployed_count, made_ready

from repopt_jax import models
from repopt_jax.cli import networks
from repopt_jax.cli.main import main
from repopt_jax.models import registry
from repopt_jax.models.published import PUBLISHED
from repopt_jax.surgery.describe import describe

ROWS = {row["name"]: row for row in networks.networks()}
OWN = tuple(registry._entries())  # other tests may have registered some of their own
# One of each family and of each kind of structure; `long` counts all.
FEW = (
    *("repopt-vgg-b1", "repvgg-a0", "vgg-digits", "repghost-digits", "repopt-ghostnet-0.5"),
    *("mobileone-digits", "repmlpnet-digits", "fcos-scenes", "fcos-face"),
)
AGAIN = "run scripts/tables.py, which counts them anew"
# Billions of multiply-accumulates as the authors give them: RepVGG, arXiv 2101.03697, table 4; the READMEs
# of RepMLP; those of RepOptimizers, RepGhost and MobileOne. Some were rounded, others cut off.
FLOPS = {
    **{"repvgg-a0": 1.4, "repvgg-a2": 5.1, "repvgg-b1": 11.8, "repvgg-b1g4": 7.3, "repvgg-b3": 26.2},
    **{"repmlpnet-t224": 2.8, "repmlpnet-t256": 4.2, "repmlpnet-l256": 11.5, "repopt-vgg-l2": 32.8},
    **{"repghost-0.5": 0.043, "repghost-1.0": 0.142, "mobileone-s0": 0.27, "mobileone-s4": 2.98},
}


def test_the_table_has_the_networks_of_the_registry():
    assert tuple(ROWS) == OWN, AGAIN
    assert set(PUBLISHED) <= set(OWN)
    for name, row in ROWS.items():
        entry = models.find(name)
        assert (row["mode"], row["task"]) == (entry.mode, entry.task), AGAIN
        found = None if row["top1"] is None else (row["top1"], row["source"], row["image_size"])
        assert found == (None if entry.published is None else tuple(entry.published)), AGAIN
        assert entry.published is PUBLISHED.get(name)


@pytest.mark.parametrize("name", FEW)
def test_its_counts_are_those_of_the_networks(name):
    assert ROWS[name] == dataclasses.asdict(describe(name)), AGAIN


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in OWN if name not in FEW])
def test_all_of_its_counts_are(name):
    assert ROWS[name] == dataclasses.asdict(describe(name)), AGAIN


def test_a_description_is_counted_on_a_network_that_is_made():
    entry, found = models.find("repvgg-a0"), describe("REPVGG-A0")
    trained = made_ready(entry.family, entry.mode, entry.variant, num_classes=1000)
    assert (found.train_parameters, found.deploy_parameters) == (count(trained), deployed_count(trained))
    # The numbers that it is not: those of a plain network, which has no branches.
    plain = made_ready(entry.family, "plain", entry.variant, num_classes=1000)
    assert found.train_parameters - count(plain) > 0.05 * count(plain)
    entry = models.find("vgg-digits")
    model = models.create("vgg-digits", num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert describe("vgg-digits").train_parameters == sum(sizes)


def test_a_network_of_your_own_is_counted_too():
    row = models.VGGVariant("table-own", (1, 1, 1, 1), (4, 4, 4, 4, 4), (1, 1, 2, 1, 1))
    models.register(models.Entry("table-own", models.vgg, row, image_size=9, num_classes=2, in_channels=1))
    try:
        found = describe("table-own")
    finally:
        registry.NETWORKS.pop("table-own")
    layers = [(9, 1, 4), (9, 4, 4), (5, 4, 4), (5, 4, 4), (5, 4, 4)]
    assert found.macs == sum(side**2 * 9 * inputs * outputs for side, inputs, outputs in layers) + 4 * 2
    assert found.deploy_parameters == sum(9 * i * o + o for _, i, o in layers) + 4 * 2 + 2
    assert found.train_parameters == found.deploy_parameters + 5 * 4
    assert (found.top1, found.source, found.mode) == (None, None, "plain")


@pytest.mark.parametrize("name", FLOPS)
def test_operations_are_the_published_ones(name):
    assert ROWS[name]["macs"] / 1e9 == pytest.approx(FLOPS[name], rel=0.035)


def test_the_page_has_the_table():
    tables = programs.load("scripts/tables.py")
    page = tables.PAGE.read_text()
    table = page[page.index(tables.BEGIN) + len(tables.BEGIN) : page.index(tables.END)]
    assert table == networks.markdown(networks.networks()), AGAIN


def test_the_command_prints_it(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["network", *OWN]
    a0 = next(line for line in lines if line.startswith("repvgg-a0 "))
    assert " ".join(a0.split()).startswith("repvgg-a0 repvgg 224 px 9,108,968 8,309,384 1.36 G 72.41 RepVGG,")
    assert a0.endswith("RepVGG, arXiv 2101.03697, table 4, 120 epochs")
    assert next(line for line in lines if line.startswith("repvgg-b2g2 ")).endswith("13.7 G")
    places = {line.index(" px") for line in lines if " px" in line}
    assert len(places) == 1


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("mobileone-s", ["mobileone-s0", "mobileone-s1", "mobileone-s2", "mobileone-s3", "mobileone-s4"]),
        ("RepVGG-B3*", ["repvgg-b3", "repvgg-b3g2", "repvgg-b3g4"]),
        ("repvgg-a?", ["repvgg-a0", "repvgg-a1", "repvgg-a2"]),
        ("repvgg-d2se", ["repvgg-d2se"]),
    ],
)
def test_a_part_of_it(capsys, pattern, names):
    assert main(["models", pattern, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found] == names
    assert found == [ROWS[name] for name in names]


def test_no_such_network(capsys):
    assert main(["models", "repvgg-a9"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("repopt: no network is named like 'repvgg-a9' (did you mean 'repvgg-a")
    assert said.err.count("\n") == 1


def test_short_numbers_have_three_digits():
    counts = (3, 894_592, 999_600, 1_129_120, 43_314_720, 275_110_400, 9_994_000_000, 11_815_485_440)
    assert [networks._short(count) for count in counts] == [
        *("0.003 k", "895 k", "1.00 M", "1.13 M", "43.3 M", "275 M", "9.99 G", "11.8 G")
    ]
