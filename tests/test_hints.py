"""The one hint of every error about an unknown name."""

import pytest

from repopt_jax.hints import did_you_mean

FIELDS = ("optim.learning_rate", "optim.ema", "model.name")


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("trian", ("search", "train"), "train"),
        ("REPVGG-B11", ("repvgg-b1", "repghost-0.5x"), "repvgg-b1"),
        ("repghst", ("repvgg-b1", "repghost-0.5x"), "repghost-0.5x"),
        ("learning_rat", FIELDS, "optim.learning_rate"),
        ("nam", FIELDS, "model.name"),
        ("--verson", ("--help", "--version"), "--version"),
        (31, ("float32", "31x"), "31x"),
        ("resnet", ("mobileone", "plain"), None),
    ],
)
def test_did_you_mean(name, known, meant):
    assert did_you_mean(name, known) == (f" (did you mean {meant!r}?)" if meant else "")
