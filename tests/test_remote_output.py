"""Outputs in stores: all or nothing, by parts, and nothing left behind."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, make_model, random_tensors, snapshot, start
from stores import LOST, S3, Asked
from test_storage import large

import modelfuse as package
from modelfuse.errors import OutputError
from modelfuse.execution import run
from modelfuse.execution.worker import Worker
from modelfuse.storage import Url, path_or_url
from modelfuse.storage.remote import uploads
from modelfuse.storage.remote.uploads import Gate

Run = Callable[..., Said]
OUT = "s3://bucket/out"
PART = 5 << 20


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest parts that S3 takes, so that small models have several."""
    monkeypatch.setattr(uploads, "PART", PART)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Two models of 15 MB."""
    return [make_model(tmp_path / name, large(seed, 11)) for seed, name in enumerate("AB")]


def names_of(asked: list[Asked], *methods: str) -> list[str]:
    return [each.path.rpartition("/")[2] for each in asked if each.method in methods]


@pytest.mark.parametrize("shards", [(), ("--max_shard_size", "6MB")], ids=["one file", "shards"])
def test_the_bytes_of_a_merge_onto_a_disk(
    merge: Run, modelfuse: Run, s3: S3, models: list[Path], parts: None, tmp_path: Path, shards: tuple[str, ...]
) -> None:
    urls = [s3.put(path, path.name) for path in models]
    merge("--model_path_list", *models, *shards, "--output_path", tmp_path / "local")
    merge("--model_path_list", *urls, *shards, "--output_path", OUT, "--n_process", 3)
    local, remote = snapshot(tmp_path / "local"), s3.objects("out")
    assert local.keys() == remote.keys()
    assert {name for name in local if local[name] != remote[name]} == {"merge_config.json", "merge_report.json"}
    assert s3.uploads() == []
    said = modelfuse("verify", OUT, "--full")
    assert said.status == 0, said.err
    assert "all merged again, with the same bytes" in said.out


def test_what_a_reader_starts_from_comes_last(merge: Run, s3: S3, models: list[Path], parts: None) -> None:
    shards = ("--max_shard_size", "6MB")
    for out, words, last in (("a", shards, "model.safetensors.index.json"), ("b", (), "model.safetensors")):
        s3.asked.clear()
        merge("--model_path_list", *models, *words, "--output_path", f"{OUT}/{out}")
        # An upload is seen when it is completed: by POST with its number, or by PUT of the whole.
        seen = [each for each in s3.asked if each.is_upload and "partNumber" not in each.query]
        seen = [each for each in seen if "uploads" not in each.query]
        assert seen[-1].path.endswith(f"/{out}/{last}")
        assert len({each.path for each in seen}) == len(seen) == len(s3.objects(f"out/{out}"))
        sent = [number for number, each in enumerate(s3.asked) if "partNumber" in each.query]
        assert len(sent) >= 3
        # All parts but the last one of each file have arrived by then; and all of them before the last file is seen.
        first = min(s3.asked.index(each) for each in seen)
        assert sum(number > first for number in sent) <= sum("uploads" in each.query for each in s3.asked)
        assert max(sent) < s3.asked.index(seen[-1])


def test_an_output_that_is_there(merge: Run, refuse: Callable[..., str], s3: S3, models: list[Path]) -> None:
    words = ("--model_path_list", *models, "--output_path", OUT)
    merge(*words, "--max_shard_size", "4MB")
    with s3.speaking() as client:
        for name in ("README.md", "deep/model.safetensors"):
            client.put_object(Bucket="bucket", Key=f"out/{name}", Body=b"mine")
    before = s3.objects("out")
    assert len([name for name in before if name.startswith("model-")]) > 2
    refuse("merge", *words, says=[OUT, "not empty"], hint="--overwrite")
    assert s3.objects("out") == before
    s3.asked.clear()
    merge(*words, "--overwrite")
    after = s3.objects("out")
    # The old shards and their index are gone, what a merge has not made is not.
    assert after.keys() == {"README.md", "deep/model.safetensors", "config.json", "merge_config.json",
                            "merge_report.json", "model.safetensors"}  # fmt: skip
    removed, made = names_of(s3.asked, "DELETE"), names_of(s3.asked, "POST", "PUT")
    assert removed[0] == "model.safetensors.index.json"
    assert all(name.startswith("model-") for name in removed[1:])
    # A reader of the old index never finds new shards, nor one of the new index old ones.
    order = [each.path.rpartition("/")[2] for each in s3.asked if each.method == "DELETE" or "uploadId" in each.query]
    assert order.index("model.safetensors.index.json") < len(order) - 1 - order[::-1].index("model.safetensors")
    assert made[-1] == "model.safetensors"


def test_an_output_that_is_a_file_or_an_input(refuse: Callable[..., str], s3: S3, models: list[Path]) -> None:
    urls = [s3.put(path, path.name) for path in models]
    words = ("merge", "--model_path_list", *urls, "--output_path")
    refuse(*words, f"{urls[0]}/config.json", says=["or one contains the other"])
    refuse(*words, f"{urls[0]}/", "--overwrite", says=["or one contains the other"])
    refuse(*words, "s3://bucket", "--overwrite", says=["or one contains the other"])
    refuse("merge", "--model_path_list", *models, "--output_path", f"{urls[0]}/config.json", says=["is a file"])
    refuse("merge", "--model_path_list", *models, "--output_path", "s3://nobody/out", says=["no bucket nobody"])


FAILURES: dict[str, Callable[[Asked], bool]] = {
    "beginning": lambda asked: "uploads" in asked.query and asked.method == "POST",
    "a part": lambda asked: "partNumber=2" in asked.query,
    "completing": lambda asked: "uploadId" in asked.query and asked.method == "POST",
    "a small file": lambda asked: asked.method == "PUT" and asked.path.endswith("merge_config.json"),
    "the index": lambda asked: asked.method == "PUT" and asked.path.endswith("index.json"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("status", [403, 500])
def test_what_fails_leaves_nothing(
    refuse: Callable[..., str], s3: S3, models: list[Path], parts: None, failure: str, status: int
) -> None:
    hit = threading.Event()

    def fault(asked: Asked) -> int | None:
        if not FAILURES[failure](asked):
            return None
        hit.set()
        return status

    s3.fault = fault
    says = [f"{OUT}/", "access is denied" if status == 403 else "status 500"]
    refuse("merge", "--model_path_list", *models, "--max_shard_size", "12MB", "--output_path", OUT, says=says)
    assert hit.is_set()
    s3.fault = lambda _: None
    assert s3.objects() == {}
    assert s3.uploads() == []


def test_an_input_that_fails_leaves_nothing(s3: S3, parts: None, tmp_path: Path) -> None:
    tensors = large(1, 40)
    good = make_model(tmp_path / "good", large(2, 40))
    tensors["model.norm.weight"] = random_tensors(1)["model.norm.weight"].repeat(250) * float("nan")
    bad = make_model(tmp_path / "bad", tensors)
    with pytest.raises(package.CheckpointError, match=r"model\.norm\.weight"):
        package.merge(model_path_list=[good, bad], output_path=OUT)
    assert any("partNumber" in each.query for each in s3.asked)
    assert s3.objects() == {}
    assert s3.uploads() == []


def test_what_passes_is_tried_again(merge: Run, s3: S3, models: list[Path], parts: None, tmp_path: Path) -> None:
    numbers = count()
    s3.fault = lambda asked: 503 if asked.is_upload and next(numbers) % 2 == 0 else None
    merge("--model_path_list", *models, "--output_path", OUT)
    s3.fault = lambda _: None
    merge("--model_path_list", *models, "--output_path", tmp_path / "local")
    assert s3.objects("out")["model.safetensors"] == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert s3.uploads() == []


def test_an_answer_that_is_lost(merge: Run, s3: S3, models: list[Path], parts: None) -> None:
    """The store has completed an upload, but nobody has heard of it: the next attempt finds none."""
    lost: list[Asked] = []

    def fault(asked: Asked) -> int | None:
        if asked.method == "POST" and "uploadId" in asked.query and not lost:
            lost.append(asked)
            return LOST
        return None

    s3.fault = fault
    merge("--model_path_list", *models, "--output_path", OUT)
    assert lost
    assert "model.safetensors" in s3.objects("out")


SLOW = (
    "from modelfuse.storage.remote import uploads; uploads.PART = 5 << 20;"
    "from modelfuse.cli.main import main; import sys;"
)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ended_from_outside(merge: Run, s3: S3, models: list[Path], how: signal.Signals) -> None:
    s3.delay = 0.3
    words = ["merge", "--model_path_list", *map(str, models), "--output_path", OUT]
    code = f"{SLOW} sys.exit(main({words!r}))"
    with start(code=code) as process:
        while not s3.uploads():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(how)
        _, err = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -9), err
    assert s3.objects() == {}
    s3.delay = 0
    if how == signal.SIGINT:
        assert "nothing was written" in err
        assert s3.uploads() == []
    else:
        assert s3.uploads() == ["out/model.safetensors"]
        # Of what is beside the output, nothing is touched.
        with s3.speaking() as client:
            client.create_multipart_upload(Bucket="bucket", Key="outer/model.safetensors")
        merge(*words[1:])
        assert s3.uploads() == ["outer/model.safetensors"]
        assert "model.safetensors" in s3.objects("out")


def test_verify_finds_what_was_changed(modelfuse: Run, merge: Run, s3: S3, models: list[Path]) -> None:
    urls = [s3.put(path, path.name) for path in models]
    merge("--model_path_list", *urls, "--output_path", OUT)
    content = bytearray(s3.objects("out")["model.safetensors"])
    content[-1] ^= 1
    with s3.speaking() as client:
        client.put_object(Bucket="bucket", Key="out/model.safetensors", Body=bytes(content))
        client.delete_object(Bucket="bucket", Key="out/config.json")
    said = modelfuse("verify", OUT)
    assert said.status == 2
    assert "model.norm.weight in model.safetensors does not have the bytes that were merged" in said.err
    assert "config.json" in said.err
    assert modelfuse("verify", "s3://bucket/nothing").status == 2


def test_parts_come_together_in_any_order(s3: S3, parts: None) -> None:
    url = path_or_url("s3://bucket/out/file")
    assert isinstance(url, Url)
    from modelfuse.storage.remote.open_store import store_of

    store, content, gate = store_of(url), bytes(range(256)) * (2 * PART // 256) + b"the end", Gate()
    upload = uploads.begin(store, url, len(content), gate)
    cuts = [*range(0, len(content), 700_001), len(content)]
    for begin, end in sorted(pairwise(cuts), key=lambda each: each[0] * 7919 % 1009):
        upload.write(begin, memoryview(content)[begin:end])
    upload.close()
    gate.drain()
    assert s3.objects("out") == {}
    upload.begin_to_complete()
    upload.complete()
    assert s3.objects("out") == {"file": content}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_what_waits_for_its_turn_is_bounded(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Files go from front to back, however long the first tensor takes and wherever copied ones are."""
    most, lock = 0, threading.Lock()
    walk, move = Worker.walk, Gate.move

    def slow(self: Worker, task: Any, *words: Any) -> Any:
        if task.tensor is not None and "layers.0." in task.tensor.name:
            time.sleep(0.5)
        return walk(self, task, *words)

    def watched(gate: Gate, nbytes: int) -> None:
        nonlocal most
        move(gate, nbytes)
        with lock:
            most = max(most, gate.ahead)

    monkeypatch.setattr(Worker, "walk", slow)
    monkeypatch.setattr(Gate, "move", watched)
    monkeypatch.setattr(run, "MOST_WAITING", 2_000_000)
    numbers = {"model.zeros": np.arange(700_000, dtype=np.int64)}
    paths = [make_model(tmp_path / name, {**large(seed, 40), **numbers}) for seed, name in enumerate("ABC")]
    settings: dict[str, Any] = {"merge_method": method, "model_path_list": paths[:2]}
    settings |= {"base_model_path": paths[2]} if method == "ties" else {}
    package.merge(**settings, output_path=tmp_path / "local")
    package.merge(**settings, output_path=OUT, n_process=4)
    assert s3.objects("out")["model.safetensors"] == (tmp_path / "local" / "model.safetensors").read_bytes()
    # What may wait, and what three workers were given before: the largest tensor each, at most.
    assert most <= 2_000_000 + 3 * 5_600_000 + uploads.PART < 40 * 1_400_000
    different = make_model(tmp_path / "D", {**large(5, 40), "model.zeros": -numbers["model.zeros"]})
    with pytest.raises(package.MismatchError, match=r"model\.zeros"):
        package.merge(model_path_list=[paths[0], different], output_path="s3://bucket/other")
    assert s3.objects("other") == {}


def test_what_is_under_way_is_bounded(s3: S3, models: list[Path], parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "UNDER_WAY", 1)
    s3.delay = 0.05
    package.merge(model_path_list=models, output_path=OUT, n_process=4)
    assert sum("partNumber" in each.query for each in s3.asked) >= 3
    assert "model.safetensors" in s3.objects("out")


def test_a_failing_output_in_any_other_store(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    real = type(memory).mv

    def mv(self: Any, path: str, *args: Any, **options: Any) -> None:
        if "merge_report" in path:
            raise PermissionError("full")
        real(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "mv", mv)
    with pytest.raises(OutputError, match=r"merge_report.json: access is denied"):
        package.merge(model_path_list=models, output_path="memory://made/out")
    assert memory.find("/made") == []
    monkeypatch.setattr(type(memory), "mv", real)
    memory.pipe("/made/out/.modelfuse-model.safetensors", b"of a run that was killed")
    package.merge(model_path_list=models, output_path="memory://made/out", overwrite=True)
    assert [name for name in memory.find("/made") if ".modelfuse-" in name] == []
    assert json.loads(memory.cat("/made/out/merge_report.json"))["files"]
    memory.rm("/made", recursive=True)
