"""Processes that start in milliseconds: forks of a server that has imported torch and pyrovae.

An interpreter of its own would import them for seconds. The server computes nothing, so that its
forks may, also where there is a GPU.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pyrovae.cli", "pyrovae.runs.experiment", "torch._dynamo", "torch.distributed.run"]
)


class Fork:
    """A function called in a process of its own: its result is the exit code."""

    def __init__(self, function, *arguments):
        ours, theirs = SERVER.Pipe(duplex=False)
        self.stdout = os.fdopen(os.dup(ours.fileno()))
        handle, self._errors = tempfile.mkstemp()
        given = theirs, self._errors, os.getcwd(), dict(os.environ), function, arguments
        self.process = SERVER.Process(target=_call, args=given)
        self.process.start()
        self.pid = self.process.pid
        ours.close()
        theirs.close()
        os.close(handle)

    def end(self, signum=None, timeout=120):
        """The exit code, negative for a signal, and what has been printed on both streams."""
        if signum:
            os.kill(self.pid, signum)
        printed = "" if self.stdout.closed else self.stdout.read()
        self.stdout.close()
        self.process.join(timeout)
        errors = Path(self._errors)
        said = errors.read_text()
        errors.unlink()
        return self.process.exitcode, printed, said


def run_command(arguments):
    """A command of the command line, without figures."""
    from pyrovae import cli, reporting

    reporting.draw_run = lambda *arguments: {}
    return cli.main([str(argument) for argument in arguments])


def _call(out, errors, folder, environment, function, arguments):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out.fileno(), 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    out.close()
    sys.exit(function(*arguments))
