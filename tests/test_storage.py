"""Inputs in stores: the same merge as from a disk, few requests, many at a time, and what goes wrong."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapting import UP, Q, adapter_of, make_base
from conftest import Said, Stored, bf16, call, make_model, random_tensors, snapshot
from stores import ENVIRONMENT, S3, Asked, Web

import modelfuse as package
from modelfuse.errors import CheckpointError
from modelfuse.storage import Url, forget, is_file, path_or_url
from modelfuse.storage.remote import open_store, stores
from modelfuse.storage.remote.range_cache import PAGE, RANGES, RUN, Ranges
from modelfuse.storage.url import Entry, Version

Run = Callable[..., Said]
LAYOUTS = Path(__file__).parent / "fixtures" / "layouts" / "llama"


def large(seed: int, layers: int = 6) -> dict[str, np.ndarray | Stored]:
    """A few megabytes."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray | Stored] = {
        f"model.layers.{layer}.w": bf16(random.standard_normal((700, 1000))) for layer in range(layers)
    }
    return {**tensors, "model.norm.weight": bf16(random.standard_normal(1000))}


def same_but_for_names(one: Path, other: Path) -> None:
    """All files of two outputs are equal, but for what says where the inputs are."""
    wholes = [{name: each for name, each in snapshot(folder).items() if not name.startswith(("merge_", "README"))}
              for folder in (one, other)]  # fmt: skip
    assert wholes[0] == wholes[1]
    tensors = [json.loads((folder / "merge_report.json").read_text())["tensors"] for folder in (one, other)]
    assert tensors[0] == tensors[1]


# --- the same bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "della"])
def test_every_method_gives_the_bytes_of_a_merge_from_a_disk(merge: Run, s3: S3, tmp_path: Path, method: str) -> None:
    names = [make_model(tmp_path / name, large(seed), shards=2) for seed, name in enumerate(("A", "B", "base"))]
    urls = [s3.put(path, path.name) for path in names]
    for output, (one, other, base) in (("local", names), ("remote", urls)):
        bases = () if method in ("linear", "slerp") else ("--base_model_path", base)
        merge("--merge_method", method, "--model_path_list", one, other, *bases, "--output_path", tmp_path / output)
    same_but_for_names(tmp_path / "local", tmp_path / "remote")
    config = json.loads((tmp_path / "remote" / "merge_config.json").read_text())
    assert config["model_path_list"] == urls[:2]
    merge(tmp_path / "remote" / "merge_config.json", "--output_path", tmp_path / "again")
    same_but_for_names(tmp_path / "local", tmp_path / "again")


def single(folder: Path) -> list[Path]:
    return [make_model(folder / name, random_tensors(seed)) for seed, name in enumerate("AB")]


def shards_without_index(folder: Path) -> list[Path]:
    return [make_model(folder / name, random_tensors(seed), shards=3, index=False) for seed, name in enumerate("AB")]


def weight_files(folder: Path) -> list[Path]:
    return [each / "model.safetensors" for each in single(folder)]


def torch_files(folder: Path) -> list[Path]:
    torch = pytest.importorskip("torch")
    made = []
    for seed, (name, old) in enumerate((("A", False), ("B", True))):
        tensors = {key: torch.tensor(each) for key, each in random_tensors(seed).items()}
        tensors["turned"] = torch.randn(300, 200).T
        (folder / name).mkdir()
        torch.save(tensors, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        made.append(folder / name)
    return made


def both_layouts(folder: Path) -> list[Path]:
    for name, file in (("hf", "hf.safetensors"), ("paddle", "model_state.pdparams")):
        (folder / name).mkdir()
        config = json.loads((LAYOUTS / "config.json").read_text())
        if name == "hf":
            config.pop("source", None)
        (folder / name / "config.json").write_text(json.dumps(config))
        shutil.copy(LAYOUTS / file, folder / name / file.replace("hf.", "model."))
    return [folder / "hf", folder / "paddle"]


def fp8(folder: Path) -> list[Path]:
    pytest.importorskip("torch")
    from test_fp8 import bf16_model, fp8_model

    fp8_model(folder / "A", 1)
    bf16_model(folder / "B", 2)
    return [folder / "A", folder / "B"]


def adapters(folder: Path) -> list[Path]:
    base, _ = make_base(folder / "base")
    return [adapter_of(folder / "one", 1, Q, UP)[0], adapter_of(folder / "two", 2, Q)[0], base]


KINDS = (single, shards_without_index, weight_files, torch_files, both_layouts, fp8, adapters)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_input_can_be_in_a_store(merge: Run, s3: S3, tmp_path: Path, kind: Any) -> None:
    (tmp_path / "in").mkdir()
    paths = kind(tmp_path / "in")
    s3.put(tmp_path / "in", "in")
    urls = [f"s3://bucket/{path.relative_to(tmp_path)}" for path in paths]
    for output, (*models, last) in (("local", paths), ("remote", urls)):
        words = (["--base_model_path", last] if kind is adapters else [last]) if models else []
        merge("--model_path_list", *models, *words, "--output_path", tmp_path / output)
    same_but_for_names(tmp_path / "local", tmp_path / "remote")


def test_inputs_here_and_there(merge: Run, s3: S3, pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge("--model_path_list", *pair, "--output_path", tmp_path / "local")
    merge("--model_path_list", pair[0], s3.put(pair[1], "deep/in/B"), "--output_path", tmp_path / "mixed")
    same_but_for_names(tmp_path / "local", tmp_path / "mixed")


def test_side_files_come_along(merge: Run, s3: S3, tmp_path: Path) -> None:
    files = {
        "tokenizer.json": "{}",
        "additional_chat_templates/tool.jinja": "x",
        "weights.bin": "no",
        "a/more.txt": "y",
    }
    paths = [make_model(tmp_path / name, random_tensors(seed), files=files) for seed, name in enumerate("AB")]
    urls = [s3.put(path, path.name) for path in paths]
    merge("--model_path_list", *urls, "--output_path", tmp_path / "out", "--copy_file_list", "a/more.txt")
    copied = {name for name in snapshot(tmp_path / "out") if not name.startswith(("merge_", "model", "README"))}
    assert copied == {"config.json", "tokenizer.json", "additional_chat_templates/tool.jinja", "a/more.txt",
                      "additional_chat_templates", "a"}  # fmt: skip


# --- requests ------------------------------------------------------------------------------------------------------


def test_requests_are_few_and_many_at_a_time(s3: S3, tmp_path: Path) -> None:
    urls = [s3.put(make_model(tmp_path / name, large(seed, 40), shards=8), name) for seed, name in enumerate("AB")]
    s3.asked.clear()
    s3.most, s3.delay = 0, 0.4  # Longer than a busy machine takes to ask for all of them.
    plan = package.check(model_path_list=urls)
    listings = [each for each in s3.asked if "list-type" in each.query]
    reads = [each for each in s3.asked if each.range]
    # One listing a model, one for its chat templates; and of every file its beginning.
    assert len(listings) <= 3
    assert len(reads) == len(s3.asked) - len(listings) <= 2 * (8 + 2)
    assert all(_length(each) <= PAGE for each in reads)
    assert s3.most > 8
    s3.asked.clear()
    s3.most, s3.delay = 0, 0.02
    package.merge(model_path_list=urls, output_path=tmp_path / "out")
    reads = [each for each in s3.asked if each.range]
    assert plan.workers < s3.most
    assert sum(_length(each) > RUN // 2 for each in reads) > 10
    assert max(map(_length, reads)) <= RUN
    # No byte twice: what the plan has read and what the tensors are, and nothing else.
    assert sum(map(_length, reads)) <= plan.bytes_read + 2 * 8 * PAGE + 100_000


def _length(asked: Asked) -> int:
    first, last = str(asked.range).removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


def test_what_is_measured_is_fetched_once_where_there_is_room(s3: S3, tmp_path: Path) -> None:
    paths = [make_model(tmp_path / name, large(seed)) for seed, name in enumerate(("A", "B", "base"))]
    urls = [s3.put(path, path.name) for path in paths]
    settings: dict[str, Any] = {"model_path_list": urls[:2], "base_model_path": urls[2], "merge_method": "ties"}
    s3.asked.clear()
    result = package.merge(**settings, output_path=tmp_path / "roomy")
    assert sum(_length(each) for each in s3.asked if each.range) <= result.bytes_read + 100_000
    package.merge(**settings, output_path=tmp_path / "narrow", memory=1)
    assert snapshot(tmp_path / "roomy").keys() == snapshot(tmp_path / "narrow").keys()
    model = "model.safetensors"
    assert (tmp_path / "roomy" / model).read_bytes() == (tmp_path / "narrow" / model).read_bytes()


def test_nothing_is_stored_on_this_machine(merge: Run, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [s3.put(make_model(tmp_path / name, random_tensors(seed)), name) for seed, name in enumerate("AB")]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    before = snapshot(tmp_path)
    merge("--model_path_list", *urls, "--output_path", "s3://bucket/out")
    assert snapshot(tmp_path) == before


def test_a_plan_of_local_models_loads_no_store(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; import modelfuse;"
        f"modelfuse.merge(model_path_list=[{str(pair[0])!r}, {str(pair[1])!r}], output_path={str(tmp_path / 'C')!r});"
        "print([each for each in sys.modules if each in ('fsspec', 'obstore', 'asyncio')"
        " or each == 'modelfuse.storage.remote.stores'])"
    )
    said = call(code=code)
    assert said.out.strip() == "[]", said


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_what_passes_is_tried_again(merge: Run, s3: S3, tmp_path: Path) -> None:
    urls = [s3.put(make_model(tmp_path / name, large(seed)), name) for seed, name in enumerate("AB")]
    numbers = count()
    s3.fault = lambda asked: (500, 503)[next(numbers) % 2] if next(numbers) % 3 == 0 else None
    merge("--model_path_list", *urls, "--output_path", tmp_path / "faulty")
    s3.fault = lambda _: None
    merge("--model_path_list", *urls, "--output_path", tmp_path / "sound")
    same_but_for_names(tmp_path / "faulty", tmp_path / "sound")


@pytest.mark.parametrize(
    ("status", "says"), [(500, "the server answered with status 500"), (403, "access is denied (AccessDenied)")]
)
def test_what_does_not_pass_is_an_error(
    refuse: Callable[..., str], s3: S3, tmp_path: Path, status: int, says: str
) -> None:
    urls = [s3.put(make_model(tmp_path / name, large(seed)), name) for seed, name in enumerate("AB")]
    # What comes before are headers; the last tensor is never sent.
    s3.fault = lambda asked: status if asked.range and not asked.range.startswith("bytes=0-") else None
    refuse("merge", "--model_path_list", *urls, "--output_path", tmp_path / "out", says=[urls[0][:-1], says])


def test_no_access_says_how_to_get_it(refuse: Callable[..., str], s3: S3, tmp_path: Path) -> None:
    s3.fault = lambda asked: 403
    words = ("merge", "--model_path_list", "s3://bucket/A", "s3://bucket/B", "--output_path", tmp_path / "out")
    refuse(*words, says=["s3://bucket/A", "access is denied"], hint="AWS_ACCESS_KEY_ID")


def test_no_credentials(refuse: Callable[..., str], s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        if "KEY" in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    words = ("merge", "--model_path_list", "s3://bucket/A", "s3://bucket/B", "--output_path", tmp_path / "out")
    refuse(*words, says=["s3://bucket/A", "without credentials"], hint="AWS_ACCESS_KEY_ID")


def test_a_wrong_endpoint(refuse: Callable[..., str], s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    words = ("merge", "--model_path_list", "s3://bucket/A", "s3://bucket/B", "--output_path", tmp_path / "out")
    refuse(*words, says=["s3://bucket/A", "cannot be reached"], hint="AWS_ENDPOINT_URL")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://nobody/A", "there is no bucket nobody"),
        ("s3://bucket/nothing", "There is no folder s3://bucket/nothing"),
        ("s3://", "names no bucket"),
        ("nostore://a/b", "nostore is not a known kind of store"),
    ],
)
def test_a_url_that_leads_nowhere(refuse: Callable[..., str], s3: S3, tmp_path: Path, url: str, says: str) -> None:
    refuse("merge", "--model_path_list", url, url, "--output_path", tmp_path / "out", says=[says])


def test_a_missing_shard(refuse: Callable[..., str], s3: S3, tmp_path: Path) -> None:
    paths = [make_model(tmp_path / name, random_tensors(seed), shards=2) for seed, name in enumerate("AB")]
    (paths[1] / "model-00002-of-00002.safetensors").unlink()
    urls = [s3.put(path, path.name) for path in paths]
    says = [f"{urls[1]}/model-00002-of-00002.safetensors is missing"]
    refuse("merge", "--model_path_list", *urls, "--output_path", tmp_path / "out", says=says)


@pytest.mark.parametrize("change", ["replaced", "cut", "removed"])
def test_an_object_that_changes_meanwhile(s3: S3, tmp_path: Path, change: str) -> None:
    paths = [make_model(tmp_path / name, large(seed, 40)) for seed, name in enumerate("AB")]
    urls = [s3.put(path, path.name) for path in paths]
    changed, lock = threading.Event(), threading.Lock()

    def hit(asked: Asked) -> int | None:
        """After the headers, before any of the tensors."""
        if not asked.range or asked.range.startswith("bytes=0-") or not asked.path.startswith("/bucket/B"):
            return None
        with lock:
            if changed.is_set():
                return None
            content = (paths[1] / "model.safetensors").read_bytes()
            with s3.speaking() as client:
                place = {"Bucket": "bucket", "Key": "B/model.safetensors"}
                if change == "removed":
                    client.delete_object(**place)
                else:
                    body = content[:-100] if change == "cut" else content[:-1] + bytes([content[-1] ^ 1])
                    client.put_object(**place, Body=body)
            changed.set()
        return None

    s3.fault = hit
    with pytest.raises(CheckpointError, match=r"B/model.safetensors (was changed|is missing)"):
        package.merge(model_path_list=urls, output_path=tmp_path / "out")
    assert changed.is_set()
    assert not (tmp_path / "out").exists()


def test_a_server_that_does_not_answer(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [s3.put(make_model(tmp_path / name, random_tensors(seed)), name) for seed, name in enumerate("AB")]
    monkeypatch.setattr(stores, "SECONDS", 0.05)
    monkeypatch.setattr(stores, "ATTEMPTS", 2)
    s3.delay = 0.5
    with pytest.raises(CheckpointError, match="did not answer in time"):
        package.check(model_path_list=urls)


@pytest.mark.parametrize(
    ("module", "url", "extra"),
    [
        ("obstore", "s3://b/A", "modelfuse[remote]"),
        ("obstore", "https://b/A", "modelfuse[remote]"),
        ("obstore", "gs://b/A", "modelfuse[remote]"),
        ("obstore", "az://b/A", "modelfuse[remote]"),
        ("fsspec", "hdfs://b/A", "fsspec"),
        ("pyarrow", "hdfs://b/A", "pyarrow"),
    ],
)
def test_an_extra_that_is_missing(tmp_path: Path, module: str, url: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from modelfuse.cli.main import main;"
        f"sys.exit(main(['merge', '--model_path_list', {url!r}, {url!r}, '--output_path', {str(tmp_path / 'out')!r}]))"
    )
    said = call(code=code)
    assert said.status == 2, said
    assert said.err.startswith(f"error: {url} needs {extra}, which is not installed"), said.err
    hint = said.err.partition("pip install ")[2]  # From where modelfuse itself was installed.
    assert hint.partition(" ")[0].strip("'\n").endswith(extra.removeprefix("modelfuse"))


# --- other stores --------------------------------------------------------------------------------------------------


def test_a_web_server(merge: Run, web: Web, tmp_path: Path) -> None:
    files = {"tokenizer.json": "{}"}
    make_model(tmp_path / "web" / "A", random_tensors(1), shards=3, files=files)
    make_model(tmp_path / "web" / "B", random_tensors(2))
    merge("--model_path_list", tmp_path / "web" / "A", tmp_path / "web" / "B", "--output_path", tmp_path / "local")
    merge("--model_path_list", f"{web.url}/A", f"{web.url}/B/model.safetensors", "--output_path", tmp_path / "remote")
    same_but_for_names(tmp_path / "local", tmp_path / "remote")


def test_what_is_secret_of_a_url_is_sent_and_never_recorded(merge: Run, web: Web, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        make_model(tmp_path / "web" / name, random_tensors(seed))
    host = web.url.removeprefix("http://")
    urls = [f"http://me:hunter2@{host}/{name}/model.safetensors?X-Amz-Signature=5ecret" for name in "AB"]
    said = merge("--model_path_list", *urls, "--output_path", tmp_path / "out")
    assert all(each.query == "X-Amz-Signature=5ecret" for each in web.asked)
    assert all(each["Authorization"].startswith("Basic ") for each in web.headers)
    words = said.out + said.err + "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))
    assert "/A/model.safetensors" in words
    assert not any(secret in words for secret in ("hunter2", "5ecret", "me:"))


def test_a_web_server_that_goes_wrong(refuse: Callable[..., str], web: Web, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        make_model(tmp_path / "web" / name, random_tensors(seed))
    words = ("merge", "--model_path_list", f"{web.url}/A", f"{web.url}/B", "--output_path")
    refuse(*words, f"{web.url}/C", says=["a web server takes no files"])
    refuse("merge", "--model_path_list", f"{web.url}/A", f"{web.url}/no", "--output_path", tmp_path / "out",
           says=[f"There is no folder {web.url}/no"])  # fmt: skip
    web.fault = lambda _: 401
    refuse(*words, tmp_path / "out", says=[web.url, "access is denied (status 401)"], hint="credentials")
    web.fault = lambda _: None
    web.ranges = False
    refuse(*words, tmp_path / "out", says=["server ignores ranges"], hint="Download it")


def test_a_page_that_changes_meanwhile(web: Web, tmp_path: Path) -> None:
    for seed, name in enumerate("AB"):
        make_model(tmp_path / "web" / name, random_tensors(seed))
    plan = package.check(model_path_list=[f"{web.url}/A", f"{web.url}/B"])
    make_model(tmp_path / "web" / "B", random_tensors(5))
    RANGES.forget()
    with pytest.raises(CheckpointError, match=r"B/model.safetensors was changed while it was being read"), \
            plan.models[1]["model.norm.weight"].open() as read:  # fmt: skip
        read(0, memoryview(bytearray(4)))


def test_any_other_store(merge: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in pair:
        memory.put(str(path), f"/models/{path.name}", recursive=True)
    merge("--model_path_list", *pair, "--output_path", tmp_path / "local")
    words = ("--model_path_list", "memory://models/A", "memory://models/B", "--output_path")
    merge(*words, tmp_path / "remote")
    same_but_for_names(tmp_path / "local", tmp_path / "remote")
    merge(*words, "memory://models/C")
    memory.get("/models/C", str(tmp_path / "fetched"), recursive=True)
    same_but_for_names(tmp_path / "local", tmp_path / "fetched")
    # It has no conditional reads: it is asked whether the file is still the same.
    plan = package.check(model_path_list=["memory://models/A", "memory://models/B"])
    memory.pipe("/models/A/model.safetensors", memory.cat("/models/A/model.safetensors"))
    RANGES.forget()
    with pytest.raises(CheckpointError, match="was changed"), plan.models[0]["model.norm.weight"].open() as read:
        read(0, memoryview(bytearray(4)))
    memory.rm("/models", recursive=True)


# --- the parts -----------------------------------------------------------------------------------------------------


def test_urls() -> None:
    url = path_or_url("S3a://bucket/a/b.safetensors/")
    assert isinstance(url, Url)
    assert (str(url), url.name, url.suffix) == ("s3://bucket/a/b.safetensors", "b.safetensors", ".safetensors")
    assert [str(each) for each in url.parents] == ["s3://bucket/a", "s3://bucket"]
    assert str(path_or_url("s3://bucket") / "x" / "y") == "s3://bucket/x/y"
    assert str(url.with_name("c")) == "s3://bucket/a/c"
    assert path_or_url("s3://bucket/what?") == Url("s3", "bucket", "what?")
    signed = path_or_url("https://me:pw@host:1/a?sig=1")
    assert isinstance(signed, Url)
    assert (str(signed), (signed / "b").address) == ("https://host:1/a", "https://me:pw@host:1/a/b?sig=1")
    assert "pw" not in repr(signed)
    assert "sig" not in repr(signed)
    assert path_or_url("file:///tmp/x%20y") == Path("/tmp/x y")
    assert path_or_url("a/b") == Path("a/b").absolute()


def test_ranges_hold_no_more_than_their_room(s3: S3, tmp_path: Path) -> None:
    size = 3 * RUN + 12345
    (tmp_path / "in").mkdir()
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "in" / "file").write_bytes(content)
    url = path_or_url(s3.put(tmp_path / "in", "in") + "/file")
    assert isinstance(url, Url)
    assert is_file(url)
    entry = open_store.store_of(url).entry(url)
    assert isinstance(entry, Entry)
    version, ranges = Version(url, entry), Ranges()
    ranges.capacity = 2 * RUN
    s3.asked.clear()
    assert ranges.expect(version, 0, RUN)
    assert not ranges.expect(version, RUN, RUN)  # Half of the room is for what was read.
    for start in (*range(0, size, 1_000_000), 0, size - 7):
        buffer = bytearray(min(1_000_000, size - start))
        ranges.read(version, start, memoryview(buffer))
        assert buffer == content[start : start + len(buffer)]
        assert ranges._held <= ranges.capacity
    ranges.forget()
    assert ranges._held == ranges._ahead == 0
    forget()
