"""The law of a search (`core.law`) along a run: what its log says of Lambda and of the sum of the squares."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repopt_jax.core.branches import BranchSet
from repopt_jax.core.law import decay_loss, identity_by_decay, search_lambda, sum_of_squares
from repopt_jax.surgery.prepare import Mode
from repopt_jax.train.config import Config
from repopt_jax.train.optimizer import make_schedule, weight_decay
from repopt_jax.train.rundir import read_records


def search_law(config: Config, steps_per_epoch: int, metrics: Path) -> "SearchLaw | None":
    """The law of a run that begins, or goes on after the records in `metrics`; None where it does not apply:
    in other modes than "search", with other optimizers than SGD, and with scales that are held at some step.
    """
    optim = config.optim
    applies = config.model.mode == Mode.SEARCH and optim.name == "sgd" and config.freeze_scales is None
    if not applies or optim.momentum >= 1:
        return None
    lengths = {"epochs": config.epochs, "steps_per_epoch": steps_per_epoch}
    schedule = make_schedule(optim, **lengths, batch_size=config.batch_size)
    steps = jnp.arange(config.epochs * steps_per_epoch)
    rates = np.asarray(jax.jit(jax.vmap(schedule))(steps), np.float64)
    decay = search_lambda(weight_decay(optim, config.batch_size), 1.0, optim.momentum)
    so_far = np.concatenate([[0.0], np.cumsum(decay * rates)])
    settings = {
        "epochs": config.epochs,
        "weight_decay": weight_decay(optim, config.batch_size),
        "clip_norm": optim.clip_norm,
    }
    records = [r for r in read_records(metrics) if r["kind"] == "scales" and "law" in r]
    return SearchLaw(so_far, settings, records[-1]["law"] if records else None)


@dataclasses.dataclass
class SearchLaw:
    """What the next record says follows from the one before.

    Attributes:
      so_far: (steps + 1,), Lambda after each step.
      settings: of the run, which records repeat: epochs, weight_decay, clip_norm.
      last: the law's part of the last record; None before the first.
    """

    so_far: np.ndarray
    settings: Mapping[str, Any]
    last: Mapping[str, Any] | None

    def record(
        self,
        branch_sets: Mapping[str, BranchSet],
        vectors: Mapping[str, Mapping[str, Any]],
        previous: Mapping[str, Mapping[str, Any]],
        step: int,
    ) -> dict[str, Any]:
        """The law's part of a record of kind "scales".

        Args:
          branch_sets: of the layers.
          vectors: path -> branch -> vector, after `step`.
          previous: the same at the record before.
          step: how many steps have been made.

        Returns:
          "lambda", so far, and "lambda_end", of the whole run; the settings; and for each layer N, the sum of
          the squares of a channel's scales and u, as "found" and as "expected" by the law, means over the
          channels.
        """
        made: dict[str, Any] = {"lambda": float(self.so_far[step]), "lambda_end": float(self.so_far[-1])}
        layers: dict[str, Any] = {}
        made |= {**self.settings, "layers": layers}
        for path, branches in branch_sets.items():
            found = float(sum_of_squares(vectors[path]).mean())
            expected = found
            if self.last is not None:
                passed = made["lambda"] - self.last["lambda"]
                loss = decay_loss(branches, previous[path], vectors[path], passed)
                expected = self.last["layers"][path]["expected"] - float(loss.mean())
            layers[path] = {"found": found, "expected": expected}
        self.last = made
        return made

    def describe(self) -> str:
        """The sentence on the whole run."""
        return describe_lambda(float(self.so_far[-1]), self.settings["epochs"], self.settings["weight_decay"])


PUBLISHED = 0.936  # Lambda of the published searches
SHORT = 0.1  # Lambda below which a search has hardly begun
LONG = 0.5  # and above which it is of the published size


def describe_lambda(decay: float, epochs: int, weight_decay: float) -> str:
    """Says in plain words what a Lambda means for the scales, and how to reach 1.

    Args:
      decay: Lambda of the whole run.
      epochs, weight_decay: of the run.
    """
    published = f"(the published searches have {PUBLISHED:.2g})"
    if not decay:
        return (
            "This search has Lambda 0, for nothing decays: the sum of a channel's squared scales stays as it "
            f"is, however long it lasts; set a weight decay {published}."
        )
    u = identity_by_decay(decay)
    reach = (
        f"with this decay it would take {math.ceil(epochs / decay):,} epochs, or with these {epochs} epochs "
        f"a decay of {weight_decay / decay:.2g}, to reach Lambda 1 {published}"
    )
    if decay < SHORT:
        return (
            f"This search has Lambda {decay:.2g}: its scales are about those that it starts from (decay "
            f"alone leaves u at {u:.2f} of its start), whatever else they show; {reach}."
        )
    if decay < LONG:
        return (
            f"This search has Lambda {decay:.2g}: decay alone takes u to {u:.2f} of its start, which is part "
            f"of the way; {reach}."
        )
    return (
        f"This search has Lambda {decay:.2g}: decay alone takes u to {u:.2f} of its start, and what the "
        f"scales show beyond that comes from the data {published}."
    )
