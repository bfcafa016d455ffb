"""What only Linux has is done without where it is taken away; Windows gets a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import array, call, make_model, random_tensors, read_model, snapshot

import modelfuse as package
from modelfuse import __main__ as program

#: A Python as macOS has it: without Linux's calls, files and C functions.
WITHOUT = """
import os, sys
from pathlib import Path
LINUX = ("posix_fadvise", "posix_fallocate", "sched_getaffinity", "memfd_create", "copy_file_range", "sendfile",
         "POSIX_FADV_DONTNEED", "POSIX_FADV_WILLNEED", "splice", "eventfd", "pidfd_open", "fdatasync")
for name in LINUX:
    if hasattr(os, name):
        delattr(os, name)
sys.platform = "darwin"
from modelfuse.storage.local import system_calls
mac = {"pread", "fsync"}
find = system_calls.find
system_calls.find = lambda *names: find(*(name for name in names if name in mac)) if mac & {*names} else None
read_text, exists = Path.read_text, Path.exists
def no_linux(path):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(path))
def read(path, *words, **more):
    no_linux(path)
    return read_text(path, *words, **more)
Path.read_text = read
from modelfuse.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("method", ["linear", "ties", "della", "slerp"])
def test_everything_works_without_what_only_linux_has(tmp_path: Path, method: str) -> None:
    models = [make_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate(("base", "A", "B"))]
    words = ["merge", "--merge_method", method, "--model_path_list", *models[1:], "--base_model_path", models[0]]
    for more in ([], ["--overwrite"]):  # The second one swaps folders.
        said = call(*words, "--output_path", tmp_path / "C", *more, code=WITHOUT)
        assert said.status == 0, said.err
    said = call("verify", tmp_path / "C", code=WITHOUT)
    assert said.status == 0, said.err
    assert call(*words, "--output_path", tmp_path / "D").status == 0
    one, other = read_model(tmp_path / "C"), read_model(tmp_path / "D")
    for name in other:
        np.testing.assert_array_equal(array(one[name]), array(other[name]))
    assert not [name for name in snapshot(tmp_path) if name.startswith(".")]


def test_windows_gets_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "name", "nt")
    status = program.main(["check"])
    monkeypatch.undo()
    assert status == 2
    assert capsys.readouterr().err == (
        "modelfuse runs on Linux and macOS. On Windows, use it in WSL, the Windows Subsystem for Linux.\n"
    )
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(package.ModelfuseError, match="runs on Linux and macOS"):
        _ = package.merge
    monkeypatch.undo()
