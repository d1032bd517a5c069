"""The readable core stands by itself, and one thing is followed through few files."""

from itertools import chain

import borders
import pytest
from tree import inner

CORE = (
    "pairs.pair",
    "pairs.traces",
    "objectives.base",
    "objectives.elbo",
    "training.svi",
    "training.loop",
    "evidence.importance",
    "evidence.weights",
)
BEYOND_THE_CORE = ("compiling", "checking", "runs")
STEP_BORDERS, LIKELIHOOD_BORDERS = 12, 60


def test_the_core_loads_nothing_of_what_is_built_on_it():
    """Neither itself nor through what it loads; functions may import what they alone need."""
    seen, waiting = set(), {*CORE}
    while waiting:
        seen |= waiting
        waiting = set(chain(*(inner(name, when_loaded=True) for name in waiting))) - seen
    assert not [name for name in seen if name.partition(".")[0] in BEYOND_THE_CORE]


@pytest.mark.parametrize(
    ("count", "bound"),
    [
        (borders.step_crossings, STEP_BORDERS),
        (borders.likelihood_crossings, LIKELIHOOD_BORDERS),
    ],
    ids=["step", "log_likelihood"],
)
def test_one_thing_is_followed_through_few_files(count, bound):
    found = count()
    assert 0 < found.total() <= bound, found.most_common()
