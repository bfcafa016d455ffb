"""The sweep of fault_sweep.py with faults that strace injects into one kind of system call; test_faults.py runs it.

    python strace_sweep.py FOLDER SCENARIO KIND [KIND ...]

A KIND is a call and its fault in the syntax of strace: ``fsync:error=EIO``.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import subprocess
import tempfile
from pathlib import Path

from fault_sweep import Ended, sweep_all

from modelfuse.cli.main import main

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


def merge_under_strace(words: list[str], kind: str, number: int) -> Ended:
    """Merge in a fork that strace is attached to; calls are counted in each of its threads."""
    call, _, fault = kind.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        said, log = Path(folder) / "said", Path(folder) / "log"
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            # Some systems let only the parent trace a process, unless the process allows others.
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
            os.close(writing)
            os.read(reading, 1)  # Returns when strace is attached.
            with said.open("w") as err, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                status = main(words)
            os._exit(status)
        os.close(reading)
        inject = f"inject={call}:{fault}:when={number}"
        command = ["strace", "-f", "-p", str(child), "-o", str(log), "-e", f"trace={call}", "-e", inject]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            os.close(writing)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            tracer.stderr.read()
        assert "attached" in line, line
        struck = re.search(r"\d+ +(.*)\(INJECTED|killed by SIGKILL", log.read_text())
        return Ended(status, struck[0][:200] if struck else "", said.read_text())


if __name__ == "__main__":
    sweep_all(merge_under_strace)
