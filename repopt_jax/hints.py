"""What an error about an unknown name suggests. The command line needs it before JAX is imported."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The hint " (did you mean 'X'?)" with the known name that is most similar to `name`, or whose part after
    the last dot is (`learning_rat`: `optim.learning_rate`); "" if none is similar. Case does not matter."""
    given = str(name).lower()
    names = {str(one).lower(): str(one) for one in known}
    last = {lower.rpartition(".")[2]: one for lower, one in names.items()}
    near = (
        [names[n] for n in difflib.get_close_matches(given, names, n=1, cutoff=0.75)]
        or [last[n] for n in difflib.get_close_matches(given.rpartition(".")[2], last, n=1)]
        or [names[n] for n in difflib.get_close_matches(given, names, n=1)]
    )
    return f" (did you mean {near[0]!r}?)" if near else ""
