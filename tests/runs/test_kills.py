"""Commands killed at random moments: each run goes on, and comes to the same numbers.

``make soak`` kills a thousand, and prints what became of them.
"""

import json
import os
import subprocess
import sys

import kills

KILLS = int(os.environ.get("PYROVAE_KILLS", "8"))


def test_a_kill_at_any_moment_loses_nothing(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, kills.__file__, str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert sum(found["kinds"].values()) >= found["kills"] == KILLS
    assert not found["failures"]
