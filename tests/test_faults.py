"""A fault at every point of a merge: a clear error, the old output or the new one whole, and the next run right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import ROOT

TESTS = Path(__file__).parent
#: Where syncing costs nothing: thousands of merges sync a dozen times each.
QUICK = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    if not QUICK.is_dir() or not os.access(QUICK, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=QUICK) as folder:
        yield Path(folder)


def run(program: str, folder: Path, scenario: str, kinds: list[str], **more: str) -> int:
    """Run a sweep; returns the number of its points."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, str(TESTS / program), str(folder), scenario, *kinds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert not [line for line in lines if not line.endswith(" points")]
    assert len(lines) == len(kinds)
    return sum(int(line.split()[-2]) for line in lines)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux") or "musl" in (sysconfig.get_config_var("SOABI") or ""):
        pytest.skip("faults.c needs a C compiler and Linux with glibc")
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, TESTS / "faults.c", "-ldl"], check=True)
    return library


@pytest.mark.parametrize(
    ("scenario", "kinds"),
    [
        ("new", ["EIO from the start"]),
        ("replacing", ["EIO", "ENOSPC", "EINTR", "short", "SIGKILL"]),
        ("resuming", ["EIO", "SIGKILL"]),
    ],
)
def test_every_call(shim: Path, folder: Path, scenario: str, kinds: list[str]) -> None:
    assert run("fault_sweep.py", folder, scenario, kinds, LD_PRELOAD=str(shim)) > 90 * len(kinds)


@pytest.fixture(scope="module")
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"strace may trace nothing here: {tried.stderr.strip()}")


@pytest.mark.usefixtures("strace")
def test_calls_that_the_kernel_fails(folder: Path) -> None:
    kinds = [
        f"{call}:error=EIO"
        for call in ("fsync", "fdatasync", "pwrite64", "renameat2", "ftruncate", "fallocate", "mkdir")
    ]
    kinds += ["pwrite64:error=ENOSPC", "fdatasync:signal=SIGKILL", "fsync:signal=SIGKILL", "renameat2:signal=SIGKILL"]
    assert run("strace_sweep.py", folder, "replacing", kinds) > 30
