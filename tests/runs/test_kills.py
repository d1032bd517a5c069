"""Commands killed at random moments: each run goes on, and comes to the same numbers.

``make soak`` kills a thousand, and prints what became of them.
"""

import json
import os

import kills
from forks import Fork

KILLS = int(os.environ.get("PYROVAE_KILLS", "8"))


def test_a_kill_at_any_moment_loses_nothing(tmp_path):
    code, printed, errors = Fork(kills.main, tmp_path, KILLS, 0).end(timeout=None)
    assert code == 0, errors
    found = json.loads(printed)
    print(found)
    assert sum(found["kinds"].values()) >= found["kills"] == KILLS
    assert not found["failures"]
