"""What the tests of examples share."""

import pytest


@pytest.fixture
def recorded(monkeypatch):
    """Run what a compiler is given, without the compiler."""
    monkeypatch.setattr("pyrovae.compiling.graph._compile", lambda graph, inputs: graph)
