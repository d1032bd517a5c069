"""The package stays small enough to be read: files, lines, borders and the readable core."""

from itertools import chain

import borders
import pytest
from tree import LIBRARY, PACKAGE, inner

# A feature raises these bounds, by what it needs; nothing else does.
FILES, FOLDERS, LINES = 110, 12, 28_924
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
CORE_LINES = 1_500
BEYOND_THE_CORE = ("compiling", "checking", "runs")
# Of an evaluation's, 4 are the check whether what the trial of particles found still holds, and 1
# makes NumPy's numbers Python's.
STEP_BORDERS, LIKELIHOOD_BORDERS = 12, 67


def lines(names):
    return sum(len(LIBRARY[name].read_text(encoding="utf-8").splitlines()) for name in names)


def test_the_package_keeps_its_size():
    assert len(LIBRARY) <= FILES
    assert len({path.parent for path in LIBRARY.values()} - {PACKAGE}) <= FOLDERS
    assert lines(LIBRARY) <= LINES


def test_the_core_can_be_read_at_a_sitting():
    assert lines(CORE) <= CORE_LINES


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
