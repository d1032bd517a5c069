"""Run Pyro's own tests with pyrovae.SVI in the place of Pyro's, and compare with Pyro's SVI.

    PYRO_TESTS=folder python tests/clients/pyro_tests.py [arguments of pytest, such as -k enum]

``folder`` is a checkout of pyro-ppl/pyro, 1.9 line, whose ``pyro`` folder is not used: the tests
run against the Pyro that is installed. Nothing is fetched, and pytest does not collect this file.
It ends with 1 if a test that passes with Pyro's SVI fails here and is not in ``STRICTER``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = (
    "tests/infer/test_valid_models.py",
    "tests/infer/test_gradient.py",
    "tests/infer/test_enum.py",
    "tests/optim",
    "tests/nn/test_module.py",
)
# Tests that fail by intent, by the beginning of their names; docs/clients.md says why of each.
STRICTER = ("tests/infer/test_valid_models.py::test_enum_in_model_multi_scale_error",)
REPLACED, OUTCOMES = "PYRO_TESTS_REPLACED", "PYRO_TESTS_OUTCOMES"


class Outcomes:
    """A plugin of pytest that writes the outcome of each test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        Path(os.environ[OUTCOMES]).write_text(json.dumps(self.found), encoding="utf-8")


def pytest_configure(config) -> None:
    """Replace Pyro's SVI before any of its tests is imported."""
    if os.environ[REPLACED]:
        import pyro.infer

        import pyrovae

        pyro.infer.SVI = pyro.infer.svi.SVI = pyrovae.SVI
    config.pluginmanager.register(Outcomes())


def outcomes(folder: Path, arguments: list[str], replaced: bool) -> dict[str, str]:
    """The outcome of each test by its name, in a process of its own."""
    with tempfile.TemporaryDirectory() as made:
        written = Path(made) / "outcomes.json"
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        names = {REPLACED: "1" if replaced else "", OUTCOMES: str(written), "PYTHONPATH": path}
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", Path(__file__).stem]
        command += ["-p", "no:cacheprovider", *TESTS, *arguments]
        subprocess.run(command, cwd=folder, env=os.environ | names, check=False)
        return json.loads(written.read_text(encoding="utf-8"))


def main() -> int:
    """Run both, print what differs, and return the exit code."""
    folder = os.environ.get("PYRO_TESTS")
    if not folder or not (Path(folder) / TESTS[0]).is_file():
        print(f"Expected PYRO_TESTS to name a checkout of pyro-ppl/pyro, got {folder!r}.")
        return 2
    theirs, ours = (outcomes(Path(folder), sys.argv[1:], replaced) for replaced in (False, True))
    passing = {name for name, outcome in theirs.items() if outcome == "passed"}
    lost = sorted(name for name in passing if ours.get(name) != "passed")
    print(f"{len(passing)} tests pass with Pyro's SVI, {len(passing) - len(lost)} of them here.")
    for name in lost:
        print(f"  {'by intent' if name.startswith(STRICTER) else 'LOST'}: {name}")
    return int(any(not name.startswith(STRICTER) for name in lost))


if __name__ == "__main__":
    sys.exit(main())
