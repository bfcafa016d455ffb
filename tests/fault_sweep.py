"""Repeat a merge with a fault at each system call in turn; test_faults.py runs it with faults.c preloaded.

One process imports and compiles everything; every merge is a fork of it. Errors are printed, one per line.

    python fault_sweep.py FOLDER SCENARIO KIND [KIND ...]
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from conftest import bf16, make_model, snapshot

from modelfuse.checkpoints.output.atomic_folder import OutputFolder
from modelfuse.checkpoints.output.background_sync import BackgroundSync
from modelfuse.cli.main import main
from modelfuse.execution import run
from modelfuse.execution.result import Result

#: Kinds of faults: an error number, or another action of faults.c; whether all later calls of the same name fail too;
#: whether calls are counted from planning on, or from the execution of the plan.
KINDS = {
    "EIO": (errno.EIO, False, False),
    "EIO from the start": (errno.EIO, False, True),
    "ENOSPC": (errno.ENOSPC, True, False),
    "EINTR": (errno.EINTR, False, False),
    "short": (-1, False, False),
    "SIGKILL": (-2, False, False),
}
#: Calls that the system never interrupts, and that are not retried.
NEVER_INTERRUPTED = ("rename", "mkdir", "rmdir", "unlink", "unlinkat", "stat64", "fstat64", "fstatat64")
_shim = ctypes.CDLL(None)


def keep_at_once() -> None:
    """Sync after every tensor, in the calling thread, so that these calls can fail as well."""
    keep = OutputFolder.keep

    def synced(folder: OutputFolder, name: str, nbytes: int, entry: object) -> None:
        with contextlib.suppress(AttributeError):  # Before the sync's thread is started.
            keep(folder, name, nbytes, entry)
            folder._sync.stop()
            folder._sync.flush()
            folder._sync = BackgroundSync(folder._keep)

    OutputFolder.keep = synced  # type: ignore[assignment, method-assign]


class Ended(NamedTuple):
    """The result of a merge.

    Attributes:
        status: Its exit status, or the negative number of the signal that killed it.
        point: The name of the call that failed; empty if none did.
        err: Its standard error.
    """

    status: int
    point: str
    err: str


#: Merges with these arguments, with a fault of this kind at the call with this number, from 1 on.
Fail = Callable[[list[str], str, int], Ended]


def merge(words: list[str], kind: str, number: int) -> Ended:
    """Merge with a fault in this process."""
    what, lasts, from_the_start = KINDS[kind]
    run_plan, err = run.run_plan, io.StringIO()

    def armed(*words: Any) -> Result:
        _shim.fault_arm(what, number, int(lasts))
        return run_plan(*words)

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        if from_the_start:
            _shim.fault_arm(what, number, int(lasts))
        else:
            run.run_plan = armed  # type: ignore[assignment]
        status = main(words)
        _shim.fault_disarm()
        run.run_plan = run_plan
    return Ended(status, _shim.fault_point().decode(), err.getvalue())


def merge_in_a_fork(words: list[str], kind: str, number: int) -> Ended:
    """Merge with a fault in a fork, which may be killed."""
    child = os.fork()
    if not child:
        os._exit(merge(words, kind, number).status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(status, "killed" if status < 0 else "", "")


@contextlib.contextmanager
def interrupted_after_two_tensors() -> Iterator[None]:
    """Raise KeyboardInterrupt in a worker when the third tensor is written."""
    write, calls = run.Run.write, []

    def interrupting(*words: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        write(*words)

    run.Run.write = interrupting  # type: ignore[assignment, method-assign]
    yield
    run.Run.write = write  # type: ignore[method-assign]


def prepare(folder: Path) -> list[str]:
    """Create models and an old output, and import and compile everything; returns the arguments of the merge."""
    models = []
    for seed, name in enumerate("AB"):
        random = np.random.default_rng(seed)
        tensors = {each: bf16(random.standard_normal(50)) for each in "abc"}
        models.append(make_model(folder / name, {**tensors, "ids": np.arange(3)}, shards=1 + seed))
    out = folder / "out" / "C"
    words = ["merge", "--model_path_list", *map(str, models), "--output_path", str(out), "--overwrite", "--quiet"]
    words += ["--n_process", "1"]  # keep_at_once must be called by one thread only.
    words += ["--merge_method", "slerp", "--max_shard_size", "300"]
    for alpha in "0", "2":  # The second is invalid, which imports the modules that report errors.
        with contextlib.redirect_stderr(io.StringIO()):
            main([*words, "--slerp_alpha", alpha])
    out.rename(folder / "old")
    return words


def sweep(folder: Path, words: list[str], scenario: str, kind: str, fail: Fail) -> Iterator[str]:
    """Merge with a fault at every counted call in turn; yields errors."""
    out = folder / "out" / "C"
    assert main(words) == 0
    new = snapshot(out)
    for number in itertools.count(1):
        shutil.rmtree(folder / "out")
        (folder / "out").mkdir()
        if scenario == "replacing":
            shutil.copytree(folder / "old", out)
        elif scenario == "resuming":
            with interrupted_after_two_tensors():
                assert main(words) == 130
            assert ".C.modelfuse.journal" in os.listdir(folder / "out")
        before = snapshot(out)
        ended = fail(words, kind, number)
        if not ended.point:
            print(f"{scenario}, {kind}: {number - 1} points", flush=True)
            return
        wrong = [*judge(ended, before, snapshot(out), new, kind)]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main(words)
        left = os.listdir(folder / "out")
        if status or snapshot(out) != new or left != ["C"]:
            wrong.append(f"the next run ends with {status}: {said.getvalue()} and leaves {left}")
        for each in wrong:
            yield f"wrong: {scenario}, {kind} at call {number} ({ended.point}): {each}"


def judge(ended: Ended, before: object, after: object, new: object, kind: str) -> Iterator[str]:
    """Check the result of a merge with a fault, and the output that it left; yields errors."""
    if ended.status not in (-9, 0, 1, 2):
        yield f"ends with {ended.status}"
    if after not in (before, new):
        yield "the output is neither the old nor the new one"
    if ended.status == 0 and after != new:
        yield "says that all is done, but it is not"
    if ended.status in (1, 2) and not ended.err.startswith("error: "):
        yield f"says {ended.err!r}"
    if kind in ("short", "EINTR") and ended.status and ended.point not in NEVER_INTERRUPTED:
        yield f"does not go on: {ended.err}"
    for word in ("Traceback", "bug"):
        if word in ended.err:
            yield ended.err


def sweep_all(fail: Fail) -> None:
    """Run the sweep of the command line's arguments."""
    folder, scenario, kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    keep_at_once()
    words = prepare(folder)
    gc.freeze()  # Otherwise garbage collection would touch, and so copy, all objects in every fork.
    for kind in kinds:
        for line in sweep(folder, words, scenario, kind, fail):
            print(line, flush=True)


if __name__ == "__main__":
    _shim.fault_point.restype = ctypes.c_char_p
    sweep_all(lambda words, kind, number: (merge_in_a_fork if kind == "SIGKILL" else merge)(words, kind, number))
