"""A merge and the page cache: inputs come in ahead, once, and make room again; what others have there stays."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Said, bf16, call, make_model

from modelfuse.checkpoints import StoredTensor
from modelfuse.checkpoints.formats.safetensors import read_safetensors
from modelfuse.checkpoints.output.background_sync import BackgroundSync
from modelfuse.execution.prefetch import Streaming
from modelfuse.execution.worker import Task
from modelfuse.storage.files import SourceFile
from modelfuse.storage.local import page_cache
from modelfuse.storage.local.page_cache import CHUNK, Advice, PageCache

sys.path.insert(0, str(ROOT / "benchmarks"))

from pages import bring_in, evict, resident

WEIGHTS = "model.safetensors"
#: What the reading of a header may leave: the chunks that the system read ahead.
HEADER = 8 * CHUNK


def tells(path: Path) -> None:
    """Skip where files do not leave the page cache, or the system does not tell what is in it."""
    try:
        evict([path])
    except OSError as error:
        pytest.skip(str(error))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        page_cache._state(descriptor, 0, CHUNK)
    except OSError:
        pytest.skip("Linux tells what is in the page cache since 6.5")
    finally:
        os.close(descriptor)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Three models of 32 MiB, in several tensors whose ends lie within chunks."""
    random = np.random.default_rng(0)
    shapes = [(1500, 1024), (3, 5), (4100, 1024), (1024,), (5000, 1024), (5000, 1100)]
    folders = []
    for number in range(3):
        tensors = {f"layers.{at}.weight": bf16(random.standard_normal(shape)) for at, shape in enumerate(shapes)}
        folders.append(make_model(tmp_path / f"model {number}", tensors))
    tells(folders[0] / WEIGHTS)
    return folders


@pytest.fixture
def cold(tmp_path: Path) -> SourceFile:
    """A file of ten chunks and a bit, out of the page cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(10 * CHUNK + 12345))
    tells(path)
    return SourceFile.at(path)


def path_of(file: SourceFile) -> Path:
    assert isinstance(file.path, Path)
    return file.path


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_cold_inputs_leave_and_what_others_have_stays(
    models: list[Path], tmp_path: Path, merge: Callable[..., Said], method: str
) -> None:
    files = [model / WEIGHTS for model in models]
    words = ("--merge_method", method, "--model_path_list", *models[:2], "--base_model_path", models[2])
    bring_in(files)
    merge(*words, "--output_path", tmp_path / "warm")
    assert [resident(file) for file in files] == [-(-file.stat().st_size // 4096) * 4096 for file in files]
    other = tmp_path / "other"
    other.write_bytes(os.urandom(CHUNK))
    bring_in([other])
    evict(files[1:])
    merge(*words, "--output_path", tmp_path / "cold", "--n_process", 2)
    assert resident(other) == CHUNK
    assert resident(files[0]) >= files[0].stat().st_size
    assert [resident(file) <= HEADER for file in files[1:]] == [True, True]
    assert (tmp_path / "cold" / WEIGHTS).read_bytes() == (tmp_path / "warm" / WEIGHTS).read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts as Linux does")
def test_what_is_measured_first_is_read_from_the_disk_once(models: list[Path], tmp_path: Path) -> None:
    evict([model / WEIGHTS for model in models])
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock
    words = ("--merge_method", "della", "--model_path_list", *models[:2], "--base_model_path", models[2])
    said = call("merge", *words, "--output_path", tmp_path / "out", "--n_process", 2)
    assert said.status == 0, said.err
    read = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock - before) * 512
    size = sum((model / WEIGHTS).stat().st_size for model in models)
    if read < size / 2:
        pytest.skip("this file system does not count what is read")
    assert read < 1.3 * size


def test_what_is_expected_comes_in_without_being_read(cold: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_read_ahead", lambda device: 128 << 10)
    cache = PageCache()
    for advice in cache.expect(cold, 3 * CHUNK + 5, 2 * CHUNK):
        advice.give()
    for _ in range(1000):
        if (there := resident(path_of(cold))) >= 3 * CHUNK:
            break
        time.sleep(0.01)
    assert there == 3 * CHUNK
    assert list(cache.expect(cold, 4 * CHUNK, CHUNK)) == []  # Asked for once.


def test_a_system_that_reads_far_ahead_needs_no_advice(cold: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_read_ahead", lambda device: CHUNK)
    cache = PageCache()
    assert list(cache.expect(cold, 0, cold.size)) == []
    assert [advice.what for advice in cache.passed(cold, 0, cold.size)] == [os.POSIX_FADV_DONTNEED]


def test_a_chunk_goes_when_the_last_of_its_bytes_was_read(cold: SourceFile) -> None:
    cache = PageCache()
    list(cache.expect(cold, 0, cold.size))
    bounds = [0, 7, CHUNK - 1, CHUNK + 5, 2 * CHUNK, cold.size - 1, cold.size]
    pieces = [(begin, end - begin) for begin, end in pairwise(bounds)]
    gone = [[run for advice in cache.passed(cold, *piece) for run in advice.runs] for piece in reversed(pieces)]
    rest = [(number * CHUNK, CHUNK) for number in range(2, 11)]
    assert gone == [[], rest, [], [(CHUNK, CHUNK)], [], [(0, CHUNK)]]


def test_what_somebody_else_has_there_never_goes(cold: SourceFile) -> None:
    with cold.open() as file:
        file.read(2 * CHUNK, memoryview(bytearray(CHUNK)))
    kept = resident(path_of(cold))
    assert kept >= CHUNK
    cache = PageCache()
    list(cache.expect(cold, 0, cold.size))
    bring_in([path_of(cold)])
    for advice in [*cache.passed(cold, 0, cold.size), *cache.leave()]:
        advice.give()
    assert kept <= resident(path_of(cold)) < kept + 2 * CHUNK


def test_a_file_in_the_cache_is_looked_at_in_few_places(cold: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_read_ahead", lambda device: 128 << 10)
    monkeypatch.setattr(page_cache, "PROBES", 4)
    looked, state = list[tuple[int, int]](), page_cache._state

    def noted(descriptor: int, offset: int, count: int) -> int:
        looked.append((offset, count))
        return state(descriptor, offset, count)

    monkeypatch.setattr(page_cache, "_state", noted)
    bring_in([path_of(cold)])
    assert list(PageCache().expect(cold, 0, cold.size)) == []
    assert looked == [(number * CHUNK, page_cache.PROBE) for number in (0, 3, 6, 9)]
    with open(path_of(cold), "rb") as file:
        os.posix_fadvise(file.fileno(), 3 * CHUNK, CHUNK, os.POSIX_FADV_DONTNEED)
    assert [advice.runs for advice in PageCache().expect(cold, 0, cold.size)] == [[(3 * CHUNK, CHUNK)]]


def test_where_the_system_does_not_tell_nothing_goes(cold: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "CACHESTAT", -1)
    cache = PageCache()
    list(cache.expect(cold, 0, cold.size))
    assert [*cache.passed(cold, 0, cold.size), *cache.leave()] == []


def test_where_the_system_takes_no_advice_merges_work(
    pair: tuple[Path, Path], tmp_path: Path, merge: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("posix_fadvise", "POSIX_FADV_WILLNEED", "POSIX_FADV_DONTNEED"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(page_cache, "SPARE", 2.0)
    monkeypatch.setattr(BackgroundSync, "_is_due", lambda sync: bool(sync._entries))
    merge("--model_path_list", *pair, "--output_path", tmp_path / "out")


def test_the_window_is_ahead_of_the_readers(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so much is asked for as the window holds; every reading of something new moves it, no second one does."""
    file = models[0] / WEIGHTS
    tensors = list(read_safetensors(file)[0].values())
    evict([file])
    asked: list[int] = []
    monkeypatch.setattr("modelfuse.execution.prefetch.WINDOW", 3 * CHUNK)
    monkeypatch.setattr("modelfuse.execution.prefetch.SPAN", 1 << 20)

    def expect(cache: PageCache, file: SourceFile, offset: int, count: int) -> Iterator[Advice]:
        asked.append(count)
        return iter(())

    monkeypatch.setattr(PageCache, "expect", expect)
    tasks = [Task((tensor,), (models[0],)) for tensor in tensors]
    streaming = Streaming(tasks)
    streaming.start()
    assert 3 * CHUNK <= sum(asked) < 4 * CHUNK + CHUNK
    done = 0
    for tensor, task in zip(tensors, tasks, strict=True):
        for _ in ("measured", "written"):
            for first in range(0, tensor.size, 1 << 20):
                count = min(1 << 20, tensor.size - first)
                streaming.begin(task, first, count)
                done = max(done, tensor.offset - tensors[0].offset + 2 * (first + count))
                everything = sum(each.nbytes for each in tensors)
                assert min(done + 3 * CHUNK, everything) <= sum(asked) < done + 4 * CHUNK + CHUNK
    assert sum(asked) == everything


def test_what_finds_no_room_is_asked_for_again_unless_it_has_begun(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store takes no more requests than there is room for; those of spans that are being read come too late."""
    tensors = list(read_safetensors(models[0] / WEIGHTS)[0].values())[:3]
    monkeypatch.setattr("modelfuse.execution.prefetch.SPAN", max(tensor.size for tensor in tensors))
    tasks = [Task((tensor,), (models[0],)) for tensor in tensors]
    sent: list[tuple[str, int]] = []
    has_room = [True, False, False, True]

    def expect(tensor: StoredTensor, start: int, count: int) -> bool:
        sent.append((tensor.name, has_room[len(sent)]))
        return has_room[len(sent) - 1]

    monkeypatch.setattr(StoredTensor, "expect", expect)
    names = [tensor.name for tensor in tensors]
    streaming = Streaming(tasks)
    streaming.start()
    assert sent == [(names[0], True), (names[1], False)]
    streaming.begin(tasks[0], 0, tensors[0].size)
    assert sent[2:] == [(names[1], False)]
    streaming.begin(tasks[1], 0, tensors[1].size)
    assert sent[3:] == [(names[2], True)]


@pytest.mark.parametrize(("spare", "stays"), [(0.0, True), (2.0, False)])
def test_an_output_takes_only_memory_that_nobody_uses(
    cold: SourceFile, monkeypatch: pytest.MonkeyPatch, spare: float, stays: bool
) -> None:
    monkeypatch.setattr(page_cache, "SPARE", spare)
    bring_in([path_of(cold)])
    descriptor = os.open(path_of(cold), os.O_RDWR)
    try:
        os.pwrite(descriptor, bytes(CHUNK), 0)
        page_cache.settle(descriptor)
    finally:
        os.close(descriptor)
    assert (resident(path_of(cold)) > 0) is stays
