"""Decides from each epoch's statistics whether the scales of a search have settled, in plain language.

A *vector* is the scale of one branch of one layer. Between two records it moves by rms(s_t - s_{t-1}).
Divided by its rms(s) at the end this has no unit, and its sum over a part of the search is the *path* of that
part.

A vector has settled when its path over the last fifth of the search is at most 10 % of its whole path (steady
motion would give 20 %) or at most 2 % of its own size. Under a decaying learning rate everything stops in the
end, so the last fifth is taken on two clocks: epochs, and full-rate epochs tau_t = sum_i lr_i / max(lr),
which advance more slowly as the rate decays. A vector that has settled on both has converged; if it has
settled in epochs only, the learning rate stopped it.

How far a search has come at all is another question, which its decay Lambda answers (`core.law`): see
`judge_law`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from repopt_jax.core.law import LayerLaw, identity_by_decay
from repopt_jax.report.records import History
from repopt_jax.train.searchlaw import SHORT, describe_lambda

LAST_PART = 0.2  # the part at the end that is judged, as a share of the search
LATE_SHARE = 0.10  # of the whole path; steady motion would give LAST_PART
LATE_SIZE = 0.02  # of the vector's own size: an absolute change that no longer matters
UNMOVED = 0.01  # of the vector's own size, over the whole search
RETURNING = 0.5  # net distance over path, of mean and spread: steady drift has 1, n random steps 1/sqrt(n)
QUORUM = 0.9  # share of the vectors that must have settled or swing
DECAYED = 0.1  # of the highest learning rate: below it the rate counts as decayed
MIN_RECORDS = 5
LAW_ERROR = 0.05  # relative, of the sum of a layer's squared scales: from there the law counts as broken


@dataclass(frozen=True)
class VectorVerdict:
    """The verdict on one vector.

    Attributes:
      layer, branch: which vector.
      state: "unmoved", "settled", "swinging", "stopped" (by the learning rate) or "moving".
      path: over the whole search, in units of the vector's size.
      late_epochs, late_rate: the share of the path in the last fifth, on the two clocks.
      done_by: the epoch at which nine tenths of the path were done.
    """

    layer: str
    branch: str
    state: str
    path: float
    late_epochs: float
    late_rate: float
    done_by: float


@dataclass(frozen=True)
class LawVerdict:
    """How far the search has come, and whether the scales obey the law of a search.

    Attributes:
      so_far, at_end: Lambda, until the last record and of the whole run.
      identity: what decay alone makes of u by the end of the run, as a share of its start.
      residuals: layer -> relative error of the sum of the squares; positive if the scales are larger.
      median: of their absolute values.
      sentence: what Lambda means, in plain language.
      notes: what else there is to say.
    """

    so_far: float
    at_end: float
    identity: float
    residuals: dict[str, float]
    median: float
    sentence: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """The answer: `sentence` in plain language, `notes` that explain it, the verdict on each vector, and on
    the law of a search where the log has what it needs."""

    settled: bool
    state: str
    sentence: str
    notes: tuple[str, ...]
    vectors: tuple[VectorVerdict, ...]
    law: LawVerdict | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        """Everything in words, in the order in which it is to be read."""
        law = () if self.law is None else (self.law.sentence, *self.law.notes)
        return (self.sentence, *law, *self.notes)


def verdict(history: History) -> Verdict:
    """Decides whether the scales have settled, by the criterion in the module's docstring.

    Raises:
      ValueError: a statistic that is not finite; the vectors are named.
    """
    _check_finite(history)
    law = judge_law(history)
    if len(history.epochs) < MIN_RECORDS:
        return Verdict(False, "too short", _sentence("too short", history, ()), (), (), law)
    vectors = tuple(judge(history, key) for key in history.vectors)
    state, settled = _overall(history, vectors)
    sentence = _sentence(state, history, vectors)
    notes = tuple(_notes(history, vectors))
    return Verdict(settled, state, sentence, notes, vectors, law)


def judge_law(history: History) -> LawVerdict | None:
    """Returns what the last record says of the law of a search; None if it says nothing."""
    if (law := history.law) is None:
        return None
    residuals = {
        layer: LayerLaw(numbers["found"], numbers["expected"]).residual
        for layer, numbers in law["layers"].items()
    }
    so_far, at_end = law["lambda"], law["lambda_end"]
    sentence = describe_lambda(at_end, law["epochs"], law["weight_decay"])
    if so_far < at_end * (1 - 1e-9):
        sentence = f"So far Lambda is {so_far:.2g}. {sentence}"
    errors = np.abs(list(residuals.values()))
    return LawVerdict(
        so_far,
        at_end,
        identity_by_decay(at_end),
        residuals,
        float(np.median(errors)),
        sentence,
        tuple(_law_notes(residuals, float(np.median(errors)), law["clip_norm"])),
    )


def _law_notes(residuals: Mapping[str, float], median: float, clip_norm: float | None) -> Iterator[str]:
    worst = max(residuals, key=lambda layer: abs(residuals[layer]))
    yield LAW.format(median=median, worst=residuals[worst], name=_short(worst))
    if broken := [layer for layer in residuals if not abs(residuals[layer]) <= LAW_ERROR]:
        names = _list([f"{_short(layer)} {residuals[layer]:+.0%}" for layer in broken])
        yield LAW_BROKEN.format(count=len(broken), total=len(residuals), names=names)
    if clip_norm is not None:
        yield LAW_CLIPPED.format(clip_norm=clip_norm)


def judge(history: History, key: tuple[str, str]) -> VectorVerdict:
    """Returns the verdict on one vector, by the criterion in the module's docstring."""
    series = history.vectors[key]
    size = max(float(series["rms"][-1]), np.finfo(float).tiny)
    steps = series["rms_change"][1:] / size
    path = float(steps.sum())
    so_far = np.concatenate([[0.0], np.cumsum(steps)])
    clocks = _clocks(history)
    late = {name: _late(clock, so_far) for name, clock in clocks.items()}
    done_by = float(np.interp(0.9 * path, so_far, history.epochs))
    settled = {name: part <= max(LATE_SHARE * path, LATE_SIZE) for name, part in late.items()}
    if path <= UNMOVED:
        state = "unmoved"
    elif all(settled.values()):
        state = "settled"
    elif _returns(series, clocks["rate"]):
        state = "swinging"
    else:
        state = "stopped" if settled["epochs"] else "moving"
    share = {name: part / path if path else 0.0 for name, part in late.items()}
    return VectorVerdict(*key, state, path, share["epochs"], share["rate"], done_by)


def _clocks(history: History) -> dict[str, np.ndarray]:
    """Returns the time of each record in epochs, and in full-rate epochs ("rate")."""
    ticks = np.diff(history.epochs)
    clocks = {"epochs": ticks, "rate": ticks * history.rates[1:]}
    return {name: np.concatenate([[0.0], np.cumsum(tick)]) for name, tick in clocks.items()}


def _late(clock: np.ndarray, so_far: np.ndarray) -> float:
    """Returns the path in the last part of the search."""
    start = (1 - LAST_PART) * clock[-1]
    return float(so_far[-1] - np.interp(start, clock, so_far))


def _returns(series: Mapping[str, np.ndarray], clock: np.ndarray) -> bool:
    """Whether mean and spread oscillated in the last fifth, rather than drifted."""
    late = clock >= (1 - LAST_PART) * clock[-1]
    late[:-1] |= late[1:]  # the first step of the part starts at the record before it
    points = np.stack([series["mean"], series["std"]], axis=1)[late]
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    net = np.linalg.norm(points[-1] - points[0])
    return bool(len(lengths) >= 4 and net <= RETURNING * lengths.sum() and lengths.sum() > 0)


def _overall(history: History, vectors: Sequence[VectorVerdict]) -> tuple[str, bool]:
    states = Counter(v.state for v in vectors if v.state != "unmoved")
    moved = states.total()
    if moved < len(vectors) / 2:
        return "unmoved", False
    if states["settled"] + states["swinging"] >= QUORUM * moved:
        if states["settled"] > states["swinging"]:
            return "settled", True
        return "swinging", bool(history.rates[-1] <= DECAYED)
    return ("stopped" if states["stopped"] > states["moving"] else "moving"), False


def _sentence(state: str, history: History, vectors: Sequence[VectorVerdict]) -> str:
    moved = [v for v in vectors if v.state != "unmoved"]
    medians = {
        field: float(np.median([getattr(v, field) for v in moved])) if moved else 0.0
        for field in ("done_by", "late_epochs", "late_rate")
    }
    name = "swinging, decayed" if state == "swinging" and history.rates[-1] <= DECAYED else state
    return SENTENCES[name].format(
        settled=sum(v.state == "settled" for v in moved),
        moved=len(moved),
        total=len(vectors),
        last=history.epochs[-1],
        longer=AT_ITS_START if history.law and history.law["lambda_end"] < SHORT else AT_REST,
        **medians,
    )


AT_REST = "and a longer search would change little"
AT_ITS_START = "but the search is short, as its Lambda says, and one with more decay would change them"
SENTENCES = {
    "settled": "The scales have settled: {settled} of {moved} scale vectors hardly moved in the last fifth "
    "of the search, the falling learning rate allowed for; nine tenths of the movement were done by epoch "
    "{done_by:.1f} of {last:.3g}, {longer}.",
    "swinging": "The scales swing about a level without drifting, the ordinary noise of SGD: let the "
    "learning rate decay to 0 at the end of the search, which averages it out.",
    "swinging, decayed": "The scales swing about a level without drifting, the ordinary noise of SGD, and "
    "the decayed learning rate has averaged it out: they can be used, {longer}.",
    "stopped": "The scales stopped because the learning rate decayed, not because they had arrived: the "
    "last fifth of the learning rate's budget made {late_rate:.0%} of their movement (steady motion makes "
    "20 %), the last fifth of the epochs {late_epochs:.1%}; they can be used, and a search of twice the "
    "{last:.3g} epochs shows whether more movement helps.",
    "moving": "The scales are still moving: only {settled} of {moved} scale vectors have settled, and the "
    "last fifth of the {last:.3g} epochs made {late_epochs:.0%} of the movement; search longer, twice as "
    "many epochs as a next step.",
    "unmoved": "Only {moved} of {total} scale vectors moved by more than 1 % of their size: the search was "
    "too short, its learning rate too small, or the scales are not trained.",
    "too short": "Too short to say whether the scales have settled: {last:.3g} epochs are recorded, and at "
    "least four records after the first are needed.",
}

LAW = (
    "The sum of a channel's squared scales is what the law of a search says (it changes by the decay of u "
    "alone) to {median:.1%} in the median layer, and to {worst:+.1%} in the worst, {name}."
)
LAW_BROKEN = (
    "{count} of {total} layers depart from the law by more than 5 % ({names}). The law is that of SGD in "
    "small steps, with one batch norm behind the branches: look for a weight decay of the scales (only u is "
    "to be decayed), for gradients clipped entry by entry, or for too high a learning rate."
)
LAW_CLIPPED = (
    "The gradients were clipped (norm {clip_norm:g}). The law is that of an unclipped search; clipping by "
    "the global norm does not break it, but it slows down what the data do and not the decay: the more is "
    "clipped, the nearer the scales come to what decay alone makes of them."
)
NEAR_START = (
    "{count} of {total} scale vectors end with a mean within 5 % of where they began. That is a valid "
    "result, not a failed search: RepOpt uses the differences between channels, branches and layers, and "
    "even constants that were never searched bring about half of its gain (published for RepOpt-VGG-B1 on "
    "ImageNet: 76.9 % with plain SGD, 77.6 with all ones, 77.7 with the depth rule, 78.5 searched). The "
    "test accuracy of the target network decides."
)
OSCILLATION = (
    "{count} scale vectors go up and down without drifting ({names}). While the learning rate is high this "
    "is normal, and no reason to search longer."
)
STILL = (
    "{count} scale vectors did not move by more than 1 % of their size ({names}). Where a layer sees a map "
    "of 1x1 pixels this is expected: every tap but the centre meets zero padding, so that there is nothing "
    "to choose between the branches (the last stage of the published RepOpt-VGG scales stays within 0.01 of "
    "1). On larger maps, see that the layer gets gradients."
)
NEGATIVE = (
    "{count} channels have a negative scale ({names}). That is harmless: SGD uses squares, AdamW and Lion "
    "absolute values; the published scale files hold 150 to 1,500 of them."
)


def _notes(history: History, vectors: Sequence[VectorVerdict]) -> Iterator[str]:
    means = np.array([[s["mean"][0], s["mean"][-1]] for s in history.vectors.values()])
    near = np.abs(means[:, 1] - means[:, 0]) <= 0.05 * np.abs(means[:, 0])
    if near.mean() >= 0.5:
        yield NEAR_START.format(count=near.sum(), total=len(near))
    names = {
        state: [f"{_short(v.layer)} {v.branch}" for v in vectors if v.state == state]
        for state in ("swinging", "unmoved")
    }
    if names["swinging"]:
        yield OSCILLATION.format(count=len(names["swinging"]), names=_list(names["swinging"]))
    if 0 < len(names["unmoved"]) < len(vectors):
        yield STILL.format(count=len(names["unmoved"]), names=_list(names["unmoved"]))
    negative = {key: int(s["negative"][-1]) for key, s in history.vectors.items()}
    if sum(negative.values()):
        named = [f"{_short(layer)} {branch}: {n}" for (layer, branch), n in negative.items() if n]
        yield NEGATIVE.format(count=sum(negative.values()), names=_list(named))


def _short(layer: str) -> str:
    """Shortens a path for readers: stages/1/0 for stages/1/0/conv/kernel."""
    return layer.removesuffix("/kernel").removesuffix("/conv")


def _list(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_finite(history: History) -> None:
    bad = [
        f"{layer} {branch}"
        for (layer, branch), series in history.vectors.items()
        if not all(np.isfinite(values).all() for values in series.values())
    ]
    if bad:
        raise ValueError(f"`history` has statistics that are not finite, of {_list(bad)}")
