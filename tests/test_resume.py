"""A merge that was killed, interrupted or found the disk full is resumed: nothing twice, the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STEPS, Said, base_and_two, bf16, make_model, snapshot, start

import modelfuse as package
from modelfuse.checkpoints.output import atomic_folder, background_sync
from modelfuse.checkpoints.tensors import Frame
from modelfuse.execution import run as running
from modelfuse.planning.operations import Operation
from modelfuse.storage.local import journal, page_cache
from modelfuse.storage.local.journal import Journal

Command = Callable[..., Said]
Words = list[Any]

#: The smallest span, so that small tensors have several.
SPAN = 1 << 18
SIZES = {"a": 3 * SPAN + 17, "b": 5, "c": SPAN, "d": 0, "e": 2 * SPAN}
#: Merges in spans as small as those, keeps each one at once, and is killed after so many.
KILLED_AFTER = """
import os, signal, sys
from modelfuse.execution import run
from modelfuse.checkpoints.output.background_sync import BackgroundSync
from modelfuse.checkpoints.output.atomic_folder import OutputFolder
from modelfuse.cli.main import main

run.SPAN = {span}
kept, keep = [], OutputFolder.keep

def keep_at_once(folder, *words):
    if len(kept) == {spans}:
        os.kill(os.getpid(), signal.SIGKILL)
    kept.append(keep(folder, *words))
    folder._sync.stop()
    folder._sync.flush()
    folder._sync = BackgroundSync(folder._keep)

OutputFolder.keep = keep_at_once
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SPAN", SPAN)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two models in bfloat16, with a tensor of integers that is copied."""
    return base_and_two(tmp_path, SIZES, SPAN + 9)


@pytest.fixture
def words(models: list[Path], tmp_path: Path) -> Words:
    return ["--n_process", 1, "--model_path_list", *models[1:], "--output_path", tmp_path / "out" / "C"]


class Written:
    """What a run writes: (tensor, first element of the slice)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slices: list[tuple[str, int]] = []
        self.end_after = 0
        write = running.Run.write

        def noted(run: running.Run, tensor: Operation, start: int, *rest: Any) -> None:
            if self.end_after and len(self.slices) == self.end_after:
                raise KeyboardInterrupt
            self.slices.append((tensor.name, start))
            write(run, tensor, start, *rest)

        monkeypatch.setattr(running.Run, "write", noted)

    def begin(self, end_after: int = 0) -> None:
        """Count anew; raise KeyboardInterrupt, as Ctrl-C does, after so many slices."""
        self.slices, self.end_after = [], end_after


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    return Written(monkeypatch)


def whole(merge: Command, words: Words, tmp_path: Path) -> dict[str, bytes | str | None]:
    """What an uninterrupted run makes at the same place; removed again."""
    merge(*words)
    made = snapshot(tmp_path / "out" / "C")
    (tmp_path / "out" / "C").rename(tmp_path / f"whole {len(os.listdir(tmp_path))}")
    return made


def slices() -> int:
    """All slices of the output, of one span each."""
    return sum(-(-size // SPAN) for size in (*SIZES.values(), SPAN + 9))


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: " ".join(steps))
def test_every_method_goes_on_with_the_same_bytes(
    modelfuse: Command, merge: Command, models: list[Path], words: Words, written: Written, tmp_path: Path, steps: Words
) -> None:
    words += [*steps, "--base_model_path", models[0]]
    expected = whole(merge, words, tmp_path)
    for end_after in (3, 4):  # The second time from where the first was interrupted.
        written.begin(end_after)
        said = modelfuse("merge", *words)
        assert said.status == 130
        assert "resumes from there" in said.err
        assert not (tmp_path / "out" / "C").exists()
    written.begin()
    said = merge(*words)
    assert "Resuming the interrupted run" in said.err
    assert len(written.slices) == slices() - 3 - 4
    assert snapshot(tmp_path / "out") == {"C": None} | {f"C/{name}": content for name, content in expected.items()}


def test_rules_go_on_with_the_same_bytes_and_changed_ones_start_afresh(
    modelfuse: Command, merge: Command, models: list[Path], words: Words, written: Written, tmp_path: Path
) -> None:
    rules: list[dict[str, object]] = [{"tensors": "a*", "merge_method": "ties"}, {"tensors": "*", "take": 2}]
    recipe = tmp_path / "rules.json"
    recipe.write_text(json.dumps({"rules": rules}))
    words = [recipe, *words]
    expected = whole(merge, words, tmp_path)
    written.begin(3)
    assert modelfuse("merge", *words).status == 130
    written.begin(1)
    said = modelfuse("merge", *words)
    assert "Resuming the interrupted run" in said.err
    recipe.write_text(json.dumps({"rules": [{**rules[0], "reserve_p": 0.5}, rules[1]]}))
    written.begin(1)
    assert "Starting over: the setting rules" in modelfuse("merge", *words).err
    recipe.write_text(json.dumps({"rules": rules}))
    written.begin()
    merge(*words)
    assert snapshot(tmp_path / "out" / "C") == expected


@pytest.mark.parametrize("workers", [(1, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--max_shard_size", 600_000, "--output_dtype", "float32"]])
def test_nothing_is_done_twice(
    modelfuse: Command,
    merge: Command,
    words: Words,
    written: Written,
    tmp_path: Path,
    workers: tuple[int, int],
    more: Words,
) -> None:
    words += more
    expected = whole(merge, [*words, "--n_process", workers[1]], tmp_path)
    old = {"config.json": b"of an old output"} if "--overwrite" in more else {}
    for name, content in old.items():
        (tmp_path / "out" / "C").mkdir(parents=True)
        (tmp_path / "out" / "C" / name).write_bytes(content)
    written.begin(end_after=6)
    assert modelfuse("merge", *words, "--n_process", workers[0]).status == 130
    assert snapshot(tmp_path / "out" / "C") == old
    first = written.slices
    written.begin()
    merge(*words, "--n_process", workers[1])
    assert snapshot(tmp_path / "out" / "C") == expected
    assert os.listdir(tmp_path / "out") == ["C"]
    again = set(first) & set(written.slices)
    # Workers that were in the middle of a span when another one was interrupted have not finished it.
    assert len(again) <= workers[0] - 1
    assert len(set(first) | set(written.slices)) == slices()


@pytest.mark.parametrize("spans", [1, 4, 9])
def test_killed(merge: Command, words: Words, written: Written, tmp_path: Path, spans: int) -> None:
    expected = whole(merge, words, tmp_path)
    code = KILLED_AFTER.format(span=SPAN, spans=spans)
    with start("merge", *words, code=code) as process:
        _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    written.begin()
    merge(*words)
    assert len(written.slices) == slices() - spans
    assert snapshot(tmp_path / "out") == {"C": None} | {f"C/{name}": content for name, content in expected.items()}


def test_killed_before_anything_was_kept(merge: Command, words: Words, written: Written, tmp_path: Path) -> None:
    code = KILLED_AFTER.format(span=SPAN, spans=0)
    with start("merge", *words, code=code) as process:
        process.communicate()
    assert os.listdir(tmp_path / "out" / ".C.modelfuse") == ["model.safetensors"]
    written.begin()
    said = merge(*words)
    assert "Resuming" not in said.err
    assert "Starting over" not in said.err
    assert len(written.slices) == slices()
    assert os.listdir(tmp_path / "out") == ["C"]


LEFT_BY_INTERRUPTING = 5


@pytest.fixture
def left(modelfuse: Command, words: Words, written: Written, tmp_path: Path) -> Path:
    """The journal of a merge that was interrupted after so many slices."""
    written.begin(LEFT_BY_INTERRUPTING)
    assert modelfuse("merge", *words).status == 130
    written.begin()
    return tmp_path / "out" / ".C.modelfuse.journal"


def retouch(path: Path) -> None:
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def replace_by_its_copy(path: Path) -> None:
    """The same bytes at the same time in another inode."""
    status = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.rename(path)


def rename_a_tensor(path: Path) -> None:
    """Another header of the same length, at the same time, in the same inode."""
    status = path.stat()
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(content.replace(b'"e"', b'"f"'))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite_a_value(path: Path) -> None:
    """Another value at the same time, in the same inode, under the same header: only the change time tells."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [retouch, replace_by_its_copy, rename_a_tensor, rewrite_a_value])
def test_a_changed_input_starts_afresh_and_says_so(
    left: Path, merge: Command, models: list[Path], words: Words, written: Written, change: Callable[[Path], None]
) -> None:
    changed = models[1:] if change is rename_a_tensor else models[2:]
    for model in changed:
        change(model / "model.safetensors")
    said = merge(*words)
    (line,) = [line for line in said.err.splitlines() if "Starting over" in line]
    assert str(changed[0]) in line
    assert "has changed since the last run" in line
    assert len(written.slices) == slices()
    assert os.listdir(left.parent) == ["C"]


@pytest.mark.parametrize("which", ["journal", "weights", "folder"])
def test_unfinished_work_behind_a_link_is_not_taken_up(
    left: Path, merge: Command, words: Words, written: Written, tmp_path: Path, which: str
) -> None:
    """Nor written to, though what it leads to is what the last run has left."""
    folder = left.parent / ".C.modelfuse"
    path = {"journal": left, "weights": folder / "model.safetensors", "folder": folder}[which]
    moved = tmp_path / "moved"
    path.rename(moved)
    path.symlink_to(moved)
    before = snapshot(tmp_path)["moved"], snapshot(moved) if moved.is_dir() else {}
    assert "Starting over" in merge(*words).err
    assert (snapshot(tmp_path)["moved"], snapshot(moved) if moved.is_dir() else {}) == before


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--weight_list", 0.5, 0.25], "the setting weight_list"),
        (["--merge_method", "dare_linear"], "the setting merge_method"),
        (["--output_dtype", "float32"], "the setting output_dtype"),
        (["--max_shard_size", 600_000], "the setting max_shard_size"),
        (["--on_nonfinite", "propagate"], "the setting on_nonfinite"),
    ],
)
def test_a_changed_setting_starts_afresh_and_says_so(
    left: Path, merge: Command, words: Words, written: Written, more: Words, name: str
) -> None:
    said = merge(*words, *more)
    assert f"Starting over: {name} has changed since the last run" in said.err
    assert len(written.slices) == slices()
    assert os.listdir(left.parent) == ["C"]


def test_another_version_starts_afresh(
    left: Path, merge: Command, words: Words, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelfuse.execution import resume

    monkeypatch.setattr(resume, "__version__", "99")
    assert "Starting over: modelfuse's version has changed" in merge(*words).err
    assert len(written.slices) == slices()


@pytest.mark.parametrize("more", [["--n_process", 3], ["--memory", "5GB"], ["--overwrite"], ["--split_pieces", 20]])
def test_a_setting_that_changes_no_byte_goes_on(
    left: Path, merge: Command, words: Words, written: Written, more: Words
) -> None:
    assert "Resuming" in merge(*words, *more).err
    assert len(written.slices) == slices() - LEFT_BY_INTERRUPTING


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("trusted", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("damage", ["torn", "flipped", "zeros", "exchanged", "dropped", "no text"])
def test_a_damaged_journal_is_trusted_up_to_there(
    left: Path, merge: Command, words: Words, written: Written, tmp_path: Path, damage: str, trusted: int
) -> None:
    expected = len(lines_of(left)) - 2
    assert expected == LEFT_BY_INTERRUPTING
    lines = lines_of(left)
    line = lines[trusted]
    following = lines[trusted + 1] if trusted + 1 < len(lines) else b""
    lines[trusted : trusted + 2] = {
        "torn": [line[:-9]],
        "flipped": [line[:30] + bytes([line[30] ^ 4]) + line[31:], following],
        "zeros": [bytes(len(line)), following],
        "exchanged": [following, line],
        "dropped": [following],
        "no text": [b"\xff\xfe\n", following],
    }[damage]
    left.write_bytes(b"".join(lines))
    said = merge(*words)
    assert ("journal is damaged" in said.err) == (trusted < 2)
    assert len(written.slices) == slices() - max(trusted - 2, 0)
    made = snapshot(tmp_path / "out" / "C")
    assert made == whole(merge, [*words, "--overwrite"], tmp_path) | {
        name: made[name] for name in ("merge_config.json", "merge_report.json")
    }
    assert package.verify(tmp_path / f"whole {len(os.listdir(tmp_path)) - 1}", full=True).holds


def test_what_is_written_after_a_damage_is_trusted_again(
    left: Path, modelfuse: Command, merge: Command, words: Words, written: Written
) -> None:
    left.write_bytes(left.read_bytes()[:-5])
    written.begin(2)
    assert modelfuse("merge", *words).status == 130
    written.begin()
    merge(*words)
    assert len(written.slices) == slices() - (LEFT_BY_INTERRUPTING - 1) - 2


@pytest.mark.parametrize("missing", ["a weight file", "the folder", "the journal"])
def test_leftovers_that_are_not_whole_are_cleared(
    left: Path, merge: Command, words: Words, written: Written, missing: str
) -> None:
    folder = left.parent / ".C.modelfuse"
    if missing == "the journal":
        left.unlink()
    else:
        (folder / "model.safetensors").unlink()
        if missing == "the folder":
            folder.rmdir()
    said = merge(*words)
    assert ("is not as the last run has left it" in said.err) == (missing != "the journal")
    assert len(written.slices) == slices()
    assert os.listdir(left.parent) == ["C"]


def test_an_old_output_is_not_taken_for_unfinished_work(
    merge: Command, modelfuse: Command, words: Words, written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed after the exchange, before the rest is cleared: the folder of the journal holds the old output."""
    merge(*words, "--weight_list", 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(background_sync, "SYNC_BYTES", 1)
        patch.setattr(atomic_folder.OutputFolder, "_clear", lambda _: None)
        patch.setattr(atomic_folder.OutputFolder, "_takes_up", lambda folder: folder._temporary.mkdir() or True)
        merge(*words, "--weight_list", 1, 0, "--overwrite")
    assert {".C.modelfuse", ".C.modelfuse.journal"} < set(os.listdir(tmp_path / "out"))
    expected = snapshot(tmp_path / "out" / "C")
    written.begin()
    said = merge(*words, "--weight_list", 1, 0, "--overwrite")
    assert "is not as the last run has left it" in said.err
    assert len(written.slices) == slices()
    assert snapshot(tmp_path / "out" / "C") == expected
    assert os.listdir(tmp_path / "out") == ["C"]


def test_progress_starts_where_the_last_run_stopped(left: Path, words: Words, written: Written) -> None:
    seen: list[int] = []
    result = package.merge(model_path_list=words[3:5], output_path=words[-1], progress=seen.append)
    assert seen[0] == result.bytes_kept
    assert result.bytes_kept > 0
    plan = package.check(model_path_list=words[3:5])
    headers = sum(len(piece) for file in plan.files for _, piece in file.frame.pieces)
    assert sum(seen) == result.bytes_read + result.bytes_written - headers


def test_nonfinite_values_of_an_earlier_run_are_reported(
    modelfuse: Command, merge: Command, models: list[Path], words: Words, written: Written, tmp_path: Path
) -> None:
    make_model(
        models[2], {**{name: bf16(np.full(size, np.nan)) for name, size in SIZES.items()}, "ids": np.arange(SPAN + 9)}
    )
    words += ["--on_nonfinite", "propagate"]
    expected = whole(merge, words, tmp_path)
    written.begin(7)
    assert modelfuse("merge", *words).status == 130
    written.begin()
    merge(*words)
    assert snapshot(tmp_path / "out" / "C") == expected
    report = expected["merge_report.json"]
    assert isinstance(report, bytes)
    assert b"nonfinite" in report


def test_a_refused_input_leaves_nothing(modelfuse: Command, models: list[Path], words: Words, tmp_path: Path) -> None:
    values = np.zeros(SIZES["e"])
    values[-1] = np.inf
    tensors = {name: bf16(np.zeros(size)) for name, size in SIZES.items()} | {"ids": np.arange(SPAN + 9)}
    make_model(models[2], {**tensors, "e": bf16(values)})
    before = snapshot(tmp_path)
    assert modelfuse("merge", *words).status == 2
    assert snapshot(tmp_path) == before


def test_a_full_disk_keeps_what_is_done(
    modelfuse: Command, merge: Command, words: Words, written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = whole(merge, words, tmp_path)
    written.begin()
    pwrite = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if len(written.slices) == 5 and len(data) > 100_000:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        said = modelfuse("merge", *words)
    assert said.status == 2
    assert "No space left on device" in said.err
    assert "the same command resumes from there" in said.err
    written.begin()
    merge(*words)
    assert len(written.slices) == slices() - 4
    assert snapshot(tmp_path / "out" / "C") == expected


def test_room_that_is_taken_already_is_not_asked_for_again(
    left: Path, merge: Command, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = sum(file.stat().st_blocks * 512 for file in (left.parent / ".C.modelfuse").iterdir())
    assert taken
    needed = package.check(model_path_list=words[3:5])
    free = shutil.disk_usage(left.parent)._replace(free=needed.disk_space - taken)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    merge(*words)


def test_a_failing_sync_in_the_background_ends_the_merge(
    modelfuse: Command, merge: Command, words: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The system tells of a lost write once, to whoever syncs first: the journal's sync must not swallow it."""
    expected = whole(merge, words, tmp_path)

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(page_cache, "sync_data", broken)
        patch.setattr(background_sync, "SYNC_BYTES", 1)
        said = modelfuse("merge", *words)
    assert said.status == 2
    assert "Input/output error" in said.err
    assert not (tmp_path / "out" / "C").exists()
    merge(*words)
    assert snapshot(tmp_path / "out" / "C") == expected


def test_a_failed_sync_is_told_of_although_it_was_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next sync of the same file may succeed, and yet the data be lost."""
    failed = threading.Event()

    def broken(_: int) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(page_cache, "sync_data", broken)
    monkeypatch.setattr(background_sync, "SYNC_BYTES", 1)
    folder = atomic_folder.OutputFolder(tmp_path / "C")

    def make() -> None:
        with folder:
            folder.create("model.safetensors", Frame(((0, b"head"),), (), 10))
            folder.keep("model.safetensors", 4, {})
            assert failed.wait(60)
            folder.commit()

    with pytest.raises(package.OutputError, match="Input/output error"):
        make()
    assert os.listdir(tmp_path) == []


class Disk:
    """What a disk would still hold after a power cut at each moment: what was synced, under names that were synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: dict[Path, bytes] = {}
        self.names: dict[Path, set[str]] = {}
        self.images: list[tuple[dict[Path, bytes], dict[Path, set[str]]]] = []
        fsync = os.fsync

        def sync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_dir():
                self.names[path] = set(os.listdir(path))
            else:
                self.files[path] = path.read_bytes()
            self.images.append((dict(self.files), dict(self.names)))
            fsync(descriptor)

        for module, name in ((os, "fsync"), (page_cache, "sync_data"), (journal, "sync_data")):
            monkeypatch.setattr(module, name, sync)

    def put_back(self, image: int, folder: Path, sizes: dict[str, int]) -> None:
        """Make ``folder`` as it was at a moment; of a file that was never synced, only the size is there."""
        files, names = self.images[image]
        folder.mkdir()
        for parent in (folder, folder / ".C.modelfuse"):
            for name in names.get(parent, ()) if parent.is_dir() else ():
                path = parent / name
                if name == ".C.modelfuse":
                    path.mkdir()
                elif name != "C":
                    path.write_bytes(files.get(path, bytes(sizes.get(name, 0))))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc to tell which file is synced")
@pytest.mark.parametrize("more", [[], ["--max_shard_size", 600_000]])
def test_a_power_cut_at_any_moment(
    merge: Command, words: Words, written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: Words
) -> None:
    """An entry is never on the disk before what it speaks of."""
    keep = atomic_folder.OutputFolder.keep

    def keep_at_once(folder: atomic_folder.OutputFolder, name: str, nbytes: int, entry: object) -> None:
        keep(folder, name, nbytes, entry)
        folder._sync.stop()
        folder._sync.flush()
        folder._sync = background_sync.BackgroundSync(folder._keep)

    monkeypatch.setattr(atomic_folder, "_identity", lambda status: [0, status.st_size])
    words += more
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder.OutputFolder, "keep", keep_at_once)
        disk = Disk(patch)
        merge(*words)
    expected = snapshot(out / "C")
    sizes = {name: len(content) for name, content in expected.items() if isinstance(content, bytes)}
    assert len(disk.images) > 2 * slices()
    done = []
    for image in range(len([0 for _, names in disk.images if "C" not in names.get(out, ())])):
        out.rename(tmp_path / f"out {image}")
        disk.put_back(image, out, sizes)
        written.begin()
        merge(*words)
        assert snapshot(out / "C") == expected, image
        assert os.listdir(out) == ["C"]
        done.append(slices() - len(written.slices))
    assert done == sorted(done)
    assert set(done) == set(range(slices() + 1))


def test_a_journal_reads_back_what_was_appended(tmp_path: Path) -> None:
    entries: list[object] = [{"a": [1, "é\udcff"]}, 2, None, "x" * 1000]
    log = Journal(tmp_path / "journal")
    for entry in entries[:2]:
        log.append([entry])
    log.close()
    log = Journal(tmp_path / "journal")
    assert list(log.read()) == entries[:2]
    log.append(entries[2:])
    log.close()
    assert list(Journal(tmp_path / "journal").read()) == entries
    Journal(tmp_path / "journal").remove()
    assert list(Journal(tmp_path / "journal").read()) == []
