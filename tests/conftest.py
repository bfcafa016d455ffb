"""Shared by the tests: tiny models created without torch, and the command line with its output."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from definitions import MERGES, SPARSIFIERS

from modelfuse.checkpoints.formats.safetensors import frame_safetensors
from modelfuse.cli.console import FORCED
from modelfuse.dtypes import BY_NAME
from modelfuse.printable import is_printable

#: The scripts there need the libraries that the fixtures were created with.
collect_ignore = ["fixtures"]
ROOT = Path(__file__).parent.parent
#: Every (sparsify_type, merge_type), as arguments of the command line.
STEPS = [
    [*(["--sparsify_type", sparsify] if sparsify else []), "--merge_type", merge]
    for sparsify in (None, *SPARSIFIERS)
    for merge in MERGES
]
#: Files whose tests compile the same kernels: in one process, each is compiled once.
COMPILING = {
    f"test_{name}.py"
    for name in ("adaptive", "arcee_methods", "array", "kernels", "line_ranks", "memory", "properties")
}
CONFIG = {"model_type": "llama", "tie_word_embeddings": False}

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Background jobs of a shell ignore SIGINT, and the processes that tests start and interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Distribute whole files among processes; files that compile the same kernels go to one process."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "compiling" if file.rpartition("/")[2] in COMPILING else file

    return Scheduling(config, log)


@dataclass(frozen=True)
class Stored:
    """A tensor as stored in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray) -> Stored:
        names = {each.numpy: each.name for each in BY_NAME.values()} | {"uint16": "U16"}
        return cls(names[array.dtype.name], array.shape, array.tobytes())


def bf16(values: Any) -> Stored:
    """Values in bfloat16, truncated instead of rounded."""
    wide = np.asarray(values, np.float32)
    return Stored("BF16", wide.shape, (wide.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def save_file(
    path: Path, tensors: Mapping[str, np.ndarray | Stored], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file."""
    stored = {name: each if isinstance(each, Stored) else Stored.of(each) for name, each in tensors.items()}
    frame = frame_safetensors(
        [(name, BY_NAME[each.dtype], each.shape) for name, each in stored.items()], metadata or {}
    )
    header = frame.pieces[0][1]
    path.write_bytes(header + b"".join(each.data for each in stored.values()))


def make_model(
    folder: Path,
    tensors: Mapping[str, np.ndarray | Stored],
    *,
    config: Mapping[str, object] | None = CONFIG,
    metadata: Mapping[str, str] | None = None,
    prefix: str = "model",
    shards: int = 1,
    index: bool = True,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder.

    Args:
        folder: The folder, which is created with its parents.
        tensors: The tensors by name, in order. uint16 arrays are stored as U16, :func:`bf16` ones as BF16.
        config: The content of config.json; None: no such file.
        metadata: The metadata of every weight file; None: ``{"format": "pt"}``.
        prefix: ``model`` or ``master_weights``.
        shards: The number of weight files, among which the tensors are distributed in turn.
        index: Whether to write an index for several shards.
        files: The contents of further files, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    names = names if shards > 1 else [f"{prefix}.safetensors"]
    for number, name in enumerate(names):
        part = {each: tensors[each] for each in list(tensors)[number::shards]}
        save_file(folder / name, part, {"format": "pt"} if metadata is None else metadata)
    if shards > 1 and index:
        weight_map = {each: names[number % shards] for number, each in enumerate(tensors)}
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (folder / f"{prefix}.safetensors.index.json").write_text(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def read_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and metadata of a safetensors file, read independently of the package's reader."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length].decode("utf-8"))
    metadata = header.pop("__metadata__", {})
    data = content[8 + length :]
    tensors = {
        name: Stored(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    return tensors, metadata


def read_model(folder: Path, prefix: str = "model") -> dict[str, Stored]:
    """All tensors of a folder, by its index if there is one."""
    index = folder / f"{prefix}.safetensors.index.json"
    if not index.exists():
        return read_file(folder / f"{prefix}.safetensors")[0]
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: read_file(folder / name)[0] for name in set(weight_map.values())}
    tensors = {name: files[file][name] for name, file in weight_map.items()}
    assert sorted(tensors) == sorted(name for file in files.values() for name in file)
    return tensors


def array(stored: Stored) -> np.ndarray:
    """The values of a tensor, bfloat16 widened to float32."""
    if stored.dtype == "BF16":
        half = np.frombuffer(stored.data, np.uint16).astype(np.uint32)
        return (half << 16).view(np.float32).reshape(stored.shape)
    return np.frombuffer(stored.data, BY_NAME[stored.dtype].numpy).reshape(stored.shape)


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything in a folder, including hidden files: the contents of files, the targets of links, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@dataclass(frozen=True)
class Said:
    """The exit status and the output of a command."""

    status: int
    out: str
    err: str


@pytest.fixture
def modelfuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command line, in this process."""
    from modelfuse.cli.main import main

    def run(*words: object) -> Said:
        capsys.readouterr()
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        if not any(name in os.environ for name in FORCED):
            # Ray's own lines are coloured by another process.
            lines = [line for line in (said.out + said.err).splitlines() if "(raylet)" not in line]
            assert is_printable("".join(lines)), "raw control characters"
        return Said(status, said.out, said.err)

    return run


@pytest.fixture
def merge(modelfuse: Callable[..., Said]) -> Callable[..., Said]:
    """``modelfuse merge`` that must succeed."""

    def run(*words: object) -> Said:
        said = modelfuse("merge", *words)
        assert said.status == 0, said.err
        return said

    return run


@pytest.fixture
def refuse(modelfuse: Callable[..., Said], tmp_path: Path) -> Callable[..., str]:
    """A command that must fail as the user's mistake: with a short message, no traceback, and no files left behind."""

    def run(*words: object, says: Sequence[object] = (), hint: str | None = None) -> str:
        before = snapshot(tmp_path)
        said = modelfuse(*words)
        assert said.status == 2, said
        lines = [
            line
            for line in said.err.splitlines()
            if not line.startswith(("fetching ", "merging ", "note: ", "warning: "))
            and re.match(r" *\d+%", line) is None
        ]
        assert lines[0].startswith("error: "), said.err
        assert "Traceback" not in said.err
        assert said.out == ""
        for part in says:
            assert str(part) in said.err
        if hint is not None:
            assert "hint: " in said.err
            assert hint in said.err.partition("hint: ")[2]
        assert snapshot(tmp_path) == before
        return said.err

    return run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of the same few tensors."""
    return make_model(tmp_path / "A", random_tensors(1)), make_model(tmp_path / "B", random_tensors(2))


def random_tensors(seed: int, *, dtype: str = "float32") -> dict[str, Any]:
    """The tensors of a tiny model, with the same names and shapes for every seed."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (11, 4), "model.layers.0.mlp.weight": (4, 5),
              "model.layers.1.mlp.weight": (4, 5), "model.norm.weight": (4,), "lm_head.weight": (11, 4)}  # fmt: skip
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: bf16(each) if dtype == "bfloat16" else each.astype(dtype) for name, each in values.items()}


def base_and_two(folder: Path, shapes: Mapping[str, int | tuple[int, ...]], integers: int) -> list[Path]:
    """A base and two models of these tensors in bfloat16, and of a copied tensor ``ids`` of ``integers`` integers."""
    made = []
    for seed, name in enumerate("ZAB"):
        random = np.random.default_rng(seed)
        tensors: dict[str, Any] = {each: bf16(random.standard_normal(shape)) for each, shape in shapes.items()}
        tensors["ids"] = np.arange(integers)
        made.append(make_model(folder / name, tensors))
    return made


def start(*words: object, folder: Path | None = None, code: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start ``python -m modelfuse`` (or ``code``) as a subprocess."""
    command = [sys.executable, "-W", "error", *(["-c", code] if code else ["-m", "modelfuse"]), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=folder or ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def call(*words: object, **options: Any) -> Said:
    """Run :func:`start` to its end."""
    with start(*words, **options) as process:
        out, err = process.communicate()
    return Said(process.returncode, out, err)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    from stores import BUCKET, S3

    server = S3()
    with server.speaking() as client:
        client.create_bucket(Bucket=BUCKET)
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A local S3 with one empty bucket; the environment directs the libraries to it."""
    from stores import ENVIRONMENT

    from modelfuse.storage.remote import open_store, stores

    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": s3_server.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    open_store.forget(connections=True)
    s3_server.reset()
    yield s3_server
    s3_server.reset()
    open_store.forget(connections=True)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Any]:
    """A web server of the folder ``web``."""
    from stores import Web

    from modelfuse.storage.remote import open_store

    (tmp_path / "web").mkdir()
    server = Web(tmp_path / "web")
    yield server
    server.stop()
    open_store.forget(connections=True)
