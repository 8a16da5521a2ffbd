"""Starts Python processes from a warm server: what they need is imported once for all of them.

A process of its own imports torch for seconds. Where a test is about that start, a lean import or
what a library reads while it loads, it takes subprocess instead.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
CONTEXT = get_context("forkserver")
_WARM = ["torch.distributed.fsdp", "torch.distributed.tensor", "pybackdoor", "open_clip", "pytest"]
CONTEXT.set_forkserver_preload(_WARM)


class Popen:
    """`python COMMAND`, of which COMMAND is `-c CODE`, `-m MODULE` or a script, and arguments.

    It has what the tests use of subprocess.Popen's methods. ``env`` is what differs from this
    process's environment; torch takes its OMP_NUM_THREADS, here 1 unless it is given. Both streams
    go to the file ``log``, if there is one.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path = HERE,
        log: IO | None = None,
    ) -> None:
        env = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | dict(env or {})
        self._said = ("", "") if log else None
        if log:
            streams = log, log
        else:
            read, write = os.pipe()
            self.stdout, self._errors = open(read), tempfile.TemporaryFile("w+")
            streams = open(write, "w"), self._errors
        arguments = ([*command], env, str(cwd), *map(_Shared, streams))
        self._process = CONTEXT.Process(target=_python, args=arguments)
        self._process.start()
        if not log:
            streams[0].close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """(standard output, standard error); of the first a pipe takes 64 kB before this."""
        self.wait(timeout)
        if self._said is None:
            with self.stdout as out, self._errors as errors:
                errors.seek(0)
                self._said = out.read(), errors.read()
        return self._said


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = HERE
) -> subprocess.CompletedProcess[str]:
    process = Popen(command, env, cwd)
    try:
        return subprocess.CompletedProcess(command, process.wait(), *process.communicate())
    finally:
        process.kill()
        process.communicate()


class _Shared:
    """A file on its way to the process, which gets its descriptor."""

    def __init__(self, file: IO) -> None:
        self.file = file

    def __reduce__(self):
        return _detach, (DupFd(self.file.fileno()),)


def _detach(shared) -> int:
    return shared.detach()


def _python(command: list[str], env: dict[str, str], cwd: str, out: int, err: int) -> None:
    import torch

    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    # What the server's streams are is its own affair.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    kind, *rest = command
    if kind == "-c":
        code, *rest = rest
        sys.argv = [kind, *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
