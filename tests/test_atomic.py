"""The output appears whole or not at all, whatever ends the merge; what goes on afterwards is in test_resume.py."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, array, make_model, random_tensors, read_model, snapshot, start

import modelfuse as package
from modelfuse.checkpoints.output import atomic_folder
from modelfuse.checkpoints.output.atomic_folder import OutputFolder
from modelfuse.storage.local import journal, preallocate

Run = Callable[..., Said]
Refuse = Callable[..., str]
Pair = tuple[Path, Path]

#: Runs the command line, but says that it has come to a moment and waits there until it is killed.
STOP_AT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background begins with it ignored.
from modelfuse.checkpoints.output import atomic_folder
from modelfuse.cli.main import main

def stop(*_, **__):
    print("there", flush=True)
    time.sleep(60)

def stop_after(function):
    def run(*words, **named):
        function(*words, **named)
        stop()
    return run

{}
sys.exit(main(sys.argv[1:]))
"""
MOMENTS = {
    "before the first byte": "atomic_folder.OutputFolder.create = stop",
    "after the first file": "atomic_folder.OutputFolder.create = stop_after(atomic_folder.OutputFolder.create)",
    "between tensors": "from modelfuse.execution.run import Run; Run.write = stop_after(Run.write)",
    "before the report": "from modelfuse.execution import run; run.write_report = stop",
    "before renaming": "atomic_folder.OutputFolder._appear = stop",
}


def killed_at(moment: str, *words: object, number: signal.Signals = signal.SIGKILL) -> Said:
    """Send a signal to a merge that has come to a moment."""
    with start("merge", "--n_process", 1, *words, "--quiet", code=STOP_AT.format(MOMENTS[moment])) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(number)
        out, err = process.communicate()
        assert line == "there\n", err
    return Said(process.returncode, out, err)


@pytest.fixture
def words(pair: Pair, tmp_path: Path) -> list[Any]:
    return ["--model_path_list", *pair, "--output_path", tmp_path / "out" / "C"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(merge: Run, words: list[Any], tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out" / "C"
    assert killed_at(moment, *words).status == -signal.SIGKILL
    assert not out.exists()
    merge(*words)
    assert sorted(os.listdir(out.parent)) == ["C"]
    assert set(read_model(out)) == set(random_tensors(0))


@pytest.mark.parametrize("moment", ["before renaming"])
def test_killed_while_replacing(merge: Run, words: list[Any], tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out" / "C"
    merge(*words)
    before = snapshot(out)
    assert killed_at(moment, *words, "--weight_list", 2, 3, "--overwrite").status == -signal.SIGKILL
    assert snapshot(out) == before
    merge(*words, "--weight_list", 2, 3, "--overwrite")
    assert sorted(os.listdir(out.parent)) == ["C"]
    expected = 2 * random_tensors(1)["lm_head.weight"] + 3 * random_tensors(2)["lm_head.weight"]
    np.testing.assert_allclose(array(read_model(out)["lm_head.weight"]), expected, rtol=1e-6)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted(
    merge: Run, words: list[Any], tmp_path: Path, moment: str, number: signal.Signals, status: int
) -> None:
    """Nothing is left, or what the next run resumes; it says which."""
    before = snapshot(tmp_path)
    said = killed_at(moment, *words, number=number)
    assert said.status == status, said.err
    assert "interrupted" in said.err
    assert "Traceback" not in said.err
    if moment in ("before the report", "before renaming"):
        assert f"kept in {tmp_path / 'out' / '.C.modelfuse'}: the same command resumes from there" in said.err
        assert sorted(os.listdir(tmp_path / "out")) == [".C.modelfuse", ".C.modelfuse.journal"]
    else:
        assert "nothing was written" in said.err
        assert snapshot(tmp_path) == before
    merge(*words)
    assert sorted(os.listdir(tmp_path / "out")) == ["C"]
    assert set(read_model(tmp_path / "out" / "C")) == set(random_tensors(0))


def test_killed_at_no_moment_in_particular(merge: Run, tmp_path: Path) -> None:
    models = [
        make_model(tmp_path / name, {str(number): np.ones(100_000, np.float32) for number in range(40)})
        for name in "AB"
    ]
    words = ["--model_path_list", *models, "--output_path", tmp_path / "out" / "C", "--n_process", 2]
    for wait in (0.01, 0.05, 0.1):
        with start("merge", *words) as process:
            assert process.stderr is not None
            process.stderr.readline()
            time.sleep(wait)
            process.kill()
        if (tmp_path / "out" / "C").exists():
            assert len(read_model(tmp_path / "out" / "C")) == 40
            merge(*words, "--overwrite")
    merge(*words, "--overwrite")
    assert sorted(os.listdir(tmp_path / "out")) == ["C"]


def test_two_at_once(refuse: Refuse, merge: Run, words: list[Any], tmp_path: Path) -> None:
    with start("merge", "--n_process", 1, *words, code=STOP_AT.format(MOMENTS["between tensors"])) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        says = ["Another merge is writing to", "C", f"process {process.pid}"]
        refuse("merge", *words, says=says, hint="another output_path")
        refuse("merge", *words, "--overwrite", says=says, hint="another output_path")
        merge(*words[:-1], tmp_path / "out" / "D")
        process.kill()
    merge(*words)
    assert sorted(os.listdir(tmp_path / "out")) == ["C", "D"]


def test_many_at_once_one_after_the_other_or_refused(tmp_path: Path, pair: Pair) -> None:
    """Threads of one process: every one either makes the whole output or says why not."""
    ends: list[str] = []

    def run() -> None:
        try:
            package.merge(model_path_list=list(pair), output_path=tmp_path / "out" / "C", overwrite=True)
            ends.append("done")
        except package.OutputError as error:
            ends.append(error.message)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "done" in ends
    assert all(end == "done" or end.startswith("Another merge is writing to") for end in ends)
    assert os.listdir(tmp_path / "out") == ["C"]
    assert set(read_model(tmp_path / "out" / "C")) == set(random_tensors(0))


def test_replacing_leaves_nothing_of_the_old(merge: Run, words: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out" / "C"
    merge(*words, "--max_shard_size", 200)
    (out / "vocab.txt").write_text("of another merge")
    assert len(list(out.glob("*.safetensors"))) > 1
    merge(*words, "--overwrite")
    assert sorted(os.listdir(out)) == [
        "README.md", "config.json", "merge_config.json", "merge_report.json", "model.safetensors",
    ]  # fmt: skip
    assert os.listdir(out.parent) == ["C"]


def test_replacing_without_the_system_call(
    merge: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    merge(*words)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    merge(*words, "--overwrite", "--weight_list", 0, 1)
    assert os.listdir(tmp_path / "out") == ["C"]
    assert (
        array(read_model(tmp_path / "out" / "C")["model.norm.weight"]).tolist()
        == random_tensors(2)["model.norm.weight"].tolist()
    )


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_replacing_in_steps_that_fails(
    modelfuse: Run, merge: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: int
) -> None:
    """The old output is there, or the new one; once killed between the steps, the next run puts it back."""
    merge(*words)
    before = snapshot(tmp_path / "out" / "C")
    calls, really = [], os.rename

    def rename(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        really(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: object())
        patch.setattr(os, "rename", rename)
        said = modelfuse("merge", *words, "--overwrite", "--weight_list", 0, 1)
    assert said.status == 2
    assert "Input/output error" in said.err
    assert ("is whole" in said.err) == (failing == 3)
    assert (snapshot(tmp_path / "out" / "C") == before) == (failing < 3)
    merge(*words, "--overwrite")
    assert os.listdir(tmp_path / "out") == ["C"]
    before = snapshot(tmp_path / "out" / "C")
    (tmp_path / "out" / "C").rename(tmp_path / "out" / ".C.modelfuse.old")
    said = modelfuse("merge", *words)
    assert said.status == 2
    assert "is put back" in said.err
    assert snapshot(tmp_path / "out" / "C") == before


def test_a_failing_replacement_leaves_the_old(
    modelfuse: Run, merge: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    merge(*words)
    before = snapshot(tmp_path / "out" / "C")

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic_folder, "exchange", broken)
    said = modelfuse("merge", *words, "--overwrite")
    assert said.status == 2
    assert "Input/output error" in said.err
    assert "resumes from there" in said.err
    assert snapshot(tmp_path / "out" / "C") == before


def test_an_empty_folder_may_be_filled(merge: Run, words: list[Any], tmp_path: Path) -> None:
    (tmp_path / "out" / "C").mkdir(parents=True)
    merge(*words)
    assert (tmp_path / "out" / "C" / "model.safetensors").exists()


def test_a_folder_filled_meanwhile_is_left_alone(
    words: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "C"
    out.mkdir(parents=True)
    appear = OutputFolder._appear

    def late(folder: OutputFolder) -> None:
        (out / "precious").write_text("x")
        appear(folder)

    monkeypatch.setattr(OutputFolder, "_appear", late)
    with pytest.raises(package.OutputError, match="not empty"):
        package.merge(model_path_list=words[1:3], output_path=out)
    assert snapshot(out) == {"precious": b"x"}
    monkeypatch.undo()
    (out / "precious").unlink()
    assert package.merge(model_path_list=words[1:3], output_path=out).bytes_kept
    assert os.listdir(tmp_path / "out") == ["C"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(merge: Run, words: list[Any], tmp_path: Path, exists: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "real"
    if exists:
        real.mkdir()
        (real / "vocab.txt").write_text("x")
    (tmp_path / "out" / "C").symlink_to(real)
    merge(*words, "--overwrite")
    assert (tmp_path / "out" / "C").is_symlink()
    assert (real / "model.safetensors").exists()
    assert not (real / "vocab.txt").exists()
    assert os.listdir(tmp_path / "out") == ["C"]
    assert os.listdir(tmp_path / "disk") == ["real"]


def test_leftovers_of_others_are_not_touched(merge: Run, words: list[Any], tmp_path: Path) -> None:
    (tmp_path / "out" / ".D.modelfuse").mkdir(parents=True)
    (tmp_path / "out" / ".C.backup").mkdir()
    merge(*words)
    assert sorted(os.listdir(tmp_path / "out")) == [".C.backup", ".D.modelfuse", "C"]


def _a_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


@pytest.mark.parametrize("plant", [_a_link, Path.hardlink_to])
@pytest.mark.parametrize("name", ["lock", "journal"])
def test_planted_links_are_not_followed(
    modelfuse: Run, words: list[Any], tmp_path: Path, name: str, plant: Callable[[Path, Path], None]
) -> None:
    """Where others may write too, a link of a name that a merge uses must not have it empty what it leads to."""
    precious = tmp_path / "precious"
    precious.write_text("of the user")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / f".C.modelfuse.{name}"
    plant(path, precious)
    said = modelfuse("merge", *words)
    assert precious.read_text() == "of the user"
    assert (said.status == 2) == (name == "lock")  # Whatever has the journal's name is only removed.
    if name == "lock":
        assert f"{path} cannot be written: there is a" in said.err
        assert "remove it" in said.err
        path.unlink()
        assert modelfuse("merge", *words).status == 0
    assert os.listdir(tmp_path / "out") == ["C"]


@pytest.mark.parametrize("name", ["lock", "journal"])
def test_pipes_in_the_place_of_our_files_are_not_waited_for(
    modelfuse: Run, words: list[Any], tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / f".C.modelfuse.{name}")
    said = modelfuse("merge", *words)
    assert said.status == (2 if name == "lock" else 0), said.err


def test_a_journal_of_another_user_is_not_trusted(
    modelfuse: Run, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".C.modelfuse.lock").touch()
    said = modelfuse("merge", *words)
    assert said.status == 2
    assert "there is a file of another user" in said.err


def test_links_in_the_place_of_unfinished_work(merge: Run, words: list[Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "model.safetensors").write_text("of the user")
    (tmp_path / "out" / ".C.modelfuse").symlink_to(tmp_path / "precious")
    (tmp_path / "out" / ".C.modelfuse.old").symlink_to(tmp_path / "precious")
    merge(*words)
    assert (tmp_path / "precious" / "model.safetensors").read_text() == "of the user"
    assert not (tmp_path / "out" / "C").is_symlink()


def test_every_worker_that_fails_ends_the_merge(
    modelfuse: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from modelfuse.kernels.arrays import passes as arrays
    from modelfuse.kernels.compiled import passes as compiled

    before = snapshot(tmp_path)
    calls: list[int] = []

    def failing(apply: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: object) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise ZeroDivisionError("injected")
            apply(*arguments)

        return counted

    for combine in (arrays.Combine, compiled.Combine):  # Which one merges depends on what was compiled before.
        monkeypatch.setattr(combine, "apply", failing(combine.apply))
    for workers in (1, 2, 7):
        calls.clear()
        said = modelfuse("merge", *words, "--n_process", workers)
        assert said.status == 1
        assert "injected" in said.err
        assert "bug in modelfuse" in said.err
        assert snapshot(tmp_path) == before


def test_a_procedure_that_fails_ends_the_merge(
    modelfuse: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from modelfuse.kernels.arrays import passes
    from modelfuse.kernels.compiled import backend

    def failing(*_: object) -> object:
        yield from ()
        raise MemoryError("injected")

    before = snapshot(tmp_path)
    for module in (passes, backend):
        monkeypatch.setattr(module, "merge_procedure", failing)
    for workers in (1, 3):
        said = modelfuse("merge", *words, "--n_process", workers)
        assert said.status == 1
        assert "injected" in said.err
        assert snapshot(tmp_path) == before


def test_a_measuring_worker_that_fails_ends_the_merge(
    modelfuse: Run, words: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from modelfuse.kernels.arrays.histograms import Gather
    from modelfuse.kernels.compiled.passes import Gather as CompiledGather

    def failing(*_: object) -> None:
        raise ZeroDivisionError("injected")

    before = snapshot(tmp_path)
    for method in ("apply", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(Gather, method, failing)
            patch.setattr(CompiledGather, method, failing)
            said = modelfuse("merge", *words, "--n_process", 2, "--merge_method", "ties")
        assert said.status == 1
        assert "injected" in said.err
        assert snapshot(tmp_path) == before


def test_progress_that_fails_ends_the_merge(pair: Pair, tmp_path: Path) -> None:
    def failing(_: int) -> None:
        raise KeyError("injected")

    before = snapshot(tmp_path)
    with pytest.raises(KeyError, match="injected"):
        package.merge(model_path_list=pair, output_path=tmp_path / "C", progress=failing)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("change", ["touched", "rewritten", "replaced", "cut", "longer", "removed"])
def test_a_model_that_changes_while_it_is_read(pair: Pair, tmp_path: Path, change: str) -> None:
    path = pair[1] / "model.safetensors"

    def progress(_: int) -> None:
        if change == "touched":
            os.utime(path, ns=(1, 1))
        elif change == "rewritten":  # As rsync --inplace --times does it.
            status = path.stat()
            with open(path, "r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\0\0")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif change == "replaced":
            (tmp_path / "new").write_bytes(path.read_bytes())
            (tmp_path / "new").replace(path)
        elif change == "cut":
            os.truncate(path, path.stat().st_size - 4)
        elif change == "longer":
            os.truncate(path, path.stat().st_size + 4)
        else:
            path.unlink(missing_ok=True)

    with pytest.raises(package.CheckpointError, match=r"changed|ends at byte|No such file") as caught:
        package.merge(model_path_list=pair, output_path=tmp_path / "C", progress=progress)
    assert str(path) in caught.value.message
    assert sorted(os.listdir(tmp_path)) == ["A", "B"]


# The place of a file is taken when it is made


def failing(monkeypatch: pytest.MonkeyPatch, *failures: int) -> None:
    """Have the system's call fail in these ways, one after the other."""
    left = list(failures)

    def take(*_: int) -> int:
        ctypes.set_errno(left.pop(0))
        return -1

    monkeypatch.setattr(preallocate, "find", lambda *_: take)


def test_a_disk_that_is_too_small_says_so_at_once(
    refuse: Refuse, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_folder.OutputFolder, "write", lambda *_: pytest.fail("nothing is to be written"))
    failing(monkeypatch, errno.ENOSPC)
    refuse("merge", *words, says=["model.safetensors", "No space left on device", "Free some space"])


@pytest.mark.parametrize("failures", [(), (errno.EOPNOTSUPP,), (errno.EINTR, errno.ENOSYS)])
def test_filesystems_that_cannot_take_it(
    merge: Run, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: tuple[int, ...]
) -> None:
    if failures:
        failing(monkeypatch, *failures)
    else:
        monkeypatch.setattr(preallocate, "find", lambda *_: None)
    merge(*words)
    assert read_model(tmp_path / "out" / "C")


def test_its_blocks_are_there_before_anything_is_written(tmp_path: Path) -> None:
    size, path = 1 << 20, tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        if not hasattr(os, "posix_fallocate"):
            pytest.skip("this system has no fallocate")
        preallocate.allocate(descriptor, size)
        found = os.fstat(descriptor)
        assert found.st_size == size
        assert found.st_blocks * 512 >= size
        assert path.read_bytes() == bytes(size)
    finally:
        os.close(descriptor)


def test_little_is_written_at_a_time(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the system needs no large blocks of memory, which may not be at hand."""
    write, sizes = os.pwrite, list[int]()

    def noted(descriptor: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", noted)
    values = np.random.default_rng(0).standard_normal((300, 1001)).astype(np.float32)
    models = [make_model(tmp_path / name, {"w": values}) for name in "AB"]
    merge("--model_path_list", *models, "--output_path", tmp_path / "C")
    assert max(sizes) == journal.PIECE < values.nbytes
    np.testing.assert_array_equal(array(read_model(tmp_path / "C")["w"]), values)
