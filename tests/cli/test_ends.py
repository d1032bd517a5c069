"""How commands end where a reader, a program or the user ends them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DIGITS, TRAIN, history, refusal, run
from forks import Fork, run_command

import pyrovae
from pyrovae.cli import _Unbroken

COMMAND = [sys.executable, "-m", "pyrovae"]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyrovae.reporting.draw_run", lambda *arguments: {})
    return tmp_path


def head(*arguments):
    """The exit code and the errors of a command whose reader reads a line and goes away."""
    fork = Fork(run_command, arguments)
    fork.stdout.readline()
    fork.stdout.close()
    code, _, error = fork.end()
    return code, error


def test_training_goes_on_when_its_reader_has_gone(workspace):
    assert head(*TRAIN, "--epochs", "3", "--out", "r") == (0, "")
    assert len(history(workspace / "r")) == 3
    assert head("evaluate", "r", "--samples", "2", "--no-diagnostics", "--json") == (0, "")


class Gone:
    def __init__(self, handle):
        self.handle = handle

    def fileno(self):
        return self.handle

    def write(self, text):
        os.write(self.handle, text.encode())

    def flush(self):
        self.write("")


def test_a_stream_without_a_reader_swallows_what_is_written():
    read, write = os.pipe()
    os.close(read)
    stream = _Unbroken(Gone(write))
    with pytest.raises(BrokenPipeError):
        stream.stream.write("a")
    assert stream.write("abc") == 3
    stream.stream.write("a")
    os.close(write)


ENDING = {
    "model": "def model(x):\n    raise SystemExit(0)\n",
    "file": "import sys\nsys.exit(0)\n",
    "constructor": (
        "import pyro.nn\nclass Model(pyro.nn.PyroModule):\n"
        "    def __init__(self, shape):\n        exit(0)\n"
    ),
}


@pytest.mark.parametrize("where", ENDING)
def test_a_program_does_not_end_a_command_as_if_it_had_succeeded(workspace, capsys, where):
    Path("own.py").write_text(ENDING[where])
    pair = ["--model", "own.py", "--guide", "mean_field", *DIGITS]
    for command in (["train", *pair, "--out", "r"], ["check", *pair]):
        said = refusal(capsys, *command)
        assert "own.py" in said
        assert "SystemExit" in said


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"pyrovae {pyrovae.__version__}\n"


@pytest.fixture
def ctrl_c():
    """A process inherits the neglect of SIGINT from a shell that runs the tests in background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


INTERRUPT = """
import os, signal, sys
class Interrupt:
    def find_spec(name, *rest):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
"""


@pytest.mark.parametrize("name", ["torch", "pyrovae.cli"])
def test_ctrl_c_in_imports_is_one_sentence(workspace, ctrl_c, name):
    (workspace / "sitecustomize.py").write_text(INTERRUPT.format(name=name))
    environment = os.environ | {"PYTHONPATH": str(workspace)}
    pipes = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*COMMAND, "list"], check=False, **pipes)
    assert (done.returncode, done.stderr) == (130, "pyrovae: stopped.\n")
