"""torch's files: every type, view and wrapper that torch.save writes comes out bit for bit."""

from __future__ import annotations

import io
import math
import runpy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelfuse.checkpoints.formats.torch_reader import read_torch
from modelfuse.checkpoints.tensors import StoredTensor
from modelfuse.checkpoints.views.strided import StridedTensor
from modelfuse.errors import CheckpointError
from modelfuse.storage.files import OpenFile

FIXTURES = Path(__file__).parent / "fixtures" / "torch"
VALUES = runpy.run_path(str(FIXTURES / "make.py"))["values"]
DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]


def content(tensor: StoredTensor, step: int | None = None) -> bytes:
    """The bytes of a tensor, read so many elements at a time."""
    step = step or max(tensor.size, 1)
    data = bytearray(tensor.nbytes)
    with tensor.open() as read:
        for start in range(0, tensor.size, step):
            begin = tensor.dtype.nbytes(start)
            read(start, memoryview(data)[begin : begin + tensor.dtype.nbytes(step)])
    return bytes(data)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="needs torch, which modelfuse itself does not use")


@pytest.fixture(params=["zip", "stream"])
def save(request: pytest.FixtureRequest, torch: Any, tmp_path: Path) -> Callable[..., Path]:
    def save_as(value: object, **options: Any) -> Path:
        path = tmp_path / "pytorch_model.bin"
        torch.save(value, path, _use_new_zipfile_serialization=request.param == "zip", **options)
        return path

    return save_as


def raw(tensor: Any) -> bytes:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def check(path: Path, expected: dict[str, Any]) -> dict[str, StoredTensor]:
    """Read a file and compare names, order, shapes, types and bytes."""
    tensors, aliases = read_torch(path)
    assert aliases == {}
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        stored = tensors[name]
        assert (stored.name, stored.shape) == (name, tuple(tensor.shape))
        assert f"torch.{stored.dtype.torch}" == str(tensor.dtype)
        for step in (None, 1, 3):
            assert content(stored, step) == raw(tensor), (name, step)
    return tensors


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_frozen_files(form: str) -> None:
    tensors, aliases = read_torch(FIXTURES / f"{form}.bin")
    assert aliases == {"lm_head.weight": "model.embed.weight"}
    assert list(tensors) == ["model.embed.weight", "model.up.weight", "model.norm.weight"]
    for name in ("model.embed.weight", "model.up.weight"):
        assert content(tensors[name]) == VALUES(name).tobytes()
    bits = VALUES("model.norm.weight").view("<u4") >> 16
    assert content(tensors["model.norm.weight"]) == bits.astype("<u2").tobytes()


def test_every_type(torch: Any, save: Callable[..., Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in DTYPES:
        bits = torch.randint(0, 256, (3, 8 * 5), dtype=torch.uint8, generator=generator)
        state[name] = bits % 2 == 1 if name == "bool" else bits.view(getattr(torch, name))
    tensors = check(save(state), state)
    assert not any(isinstance(tensor, StridedTensor) for tensor in tensors.values())


def test_sizes_from_none_to_many(torch: Any, save: Callable[..., Path]) -> None:
    state = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0),
        "empty matrix": torch.empty(3, 0, 2, dtype=torch.int64),
        "deep": torch.arange(2.0**6).reshape(2, 1, 2, 2, 1, 2, 2, 2),
    }
    check(save(state), state)


def test_views(torch: Any, save: Callable[..., Path]) -> None:
    base = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    half = torch.randn(6, 7).to(torch.bfloat16)
    state = {
        "contiguous part": base[1],
        "one element": base[1, 2, 3, 4],
        "transposed": half.T,
        "permuted": base.permute(3, 0, 2, 1),
        "large transposed": torch.randn(90, 70).T,
        "stepped": base[:, ::2, 1:3, ::3],
        "expanded": torch.arange(3.0).expand(4, 3),
        "expanded scalar": torch.tensor(7, dtype=torch.int16).expand(2, 2),
        "size one": torch.arange(6.0).reshape(3, 2)[:, :1],
        "row of one": torch.arange(6.0).reshape(2, 3)[:1],
    }
    tensors = check(save(state), state)
    plain = {name for name, tensor in tensors.items() if type(tensor) is StoredTensor}
    assert plain == {"contiguous part", "one element", "row of one"}


def test_tied_weights_keep_the_embedding(torch: Any, save: Callable[..., Path]) -> None:
    one, two, three = torch.randn(4, 3), torch.randn(5), torch.randn(2, 2)
    tensors, aliases = read_torch(
        save(
            {
                "lm_head.weight": one,
                "encoder.embed_tokens.weight": one,
                "shared.weight": one.view(4, 3),
                "cls.predictions.decoder.bias": two,
                "cls.predictions.bias": two,
                "first": three,
                "second": three,
                "reshaped": three.reshape(4),
                "transposed": three.T,
                "part": three[0],
            }
        )
    )
    assert aliases == {
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "second": "first",
    }
    kept = ["shared.weight", "cls.predictions.bias", "first", "reshaped", "transposed", "part"]
    assert list(tensors) == kept
    assert content(tensors["transposed"]) == raw(three.T)


@pytest.mark.parametrize(
    ("head", "embedding"),
    [
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "transformer.wte.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("output.weight", "tok_embeddings.weight"),
    ],
)
def test_the_kept_name_does_not_depend_on_order(torch: Any, tmp_path: Path, head: str, embedding: str) -> None:
    weight = torch.randn(2, 2)
    for number, names in enumerate([(head, embedding), (embedding, head)]):
        path = tmp_path / f"{number}.bin"
        torch.save(dict.fromkeys(names, weight), path)
        assert read_torch(path)[1] == {head: embedding}


def test_modules_parameters_and_attributes(torch: Any, save: Callable[..., Path]) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    state["parameter"] = torch.nn.Parameter(torch.randn(3))
    state["tagged parameter"] = torch.nn.Parameter(torch.randn(3))
    state["tagged parameter"].tag = {"note": 1}
    state["tagged"] = torch.randn(3)
    state["tagged"].tag = "x"
    state["grown"] = torch.randn(2, requires_grad=True)
    state["computed"] = torch.randn(2, requires_grad=True) * 2
    check(save(state), {name: tensor.detach() for name, tensor in state.items()})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(torch: Any, save: Callable[..., Path], protocol: int) -> None:
    state = {f"layer.{number}.{'é' * 120}": torch.randn(number) for number in range(300)}
    check(save(state, pickle_protocol=protocol), state)


def test_other_values_are_passed_over(torch: Any, save: Callable[..., Path]) -> None:
    state = {
        "none": None,
        "numbers": (1, 2.5, -(2**40), True),
        "text": "x" * 5000,
        "bytes": b"abc",
        "list": [1, [2, {"a": {"b"}}]],
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "numpy": np.float32(3),
        "weight": torch.ones(2),
    }
    check(save(state), {"weight": state["weight"]})


def test_wrappers_are_opened(torch: Any, save: Callable[..., Path]) -> None:
    state = {"weight": torch.randn(3), "note": "x"}
    trained = {"state": {0: {"exp_avg": torch.randn(3)}}}
    for wrapped in (
        {"state_dict": state, "epoch": 3},
        {"module": {"model": state}, "optimizer": trained, "lr_scheduler": {"last": torch.ones(1)}},
    ):
        check(save(wrapped), {"weight": state["weight"]})


def test_no_tensor_is_left_out_silently(torch: Any, save: Callable[..., Path]) -> None:
    weight = {"weight": torch.randn(3)}
    for value in (
        {"model": dict(weight), "ema": {"weight": torch.randn(3)}},
        {**weight, "more": [torch.randn(2)]},
        {**weight, "more": {"deep": (1, {"x": torch.randn(2)})}},
    ):
        with pytest.raises(CheckpointError, match="tensors in several dicts"):
            read_torch(save(value))
    for other in ([torch.randn(2)], torch.randn(2), {"list": [torch.randn(2)]}):
        with pytest.raises(CheckpointError, match="does not hold a dict of tensors"):
            read_torch(save(other))
    with pytest.raises(CheckpointError, match="under 5 instead of a name"):
        read_torch(save({5: torch.randn(2)}))


def test_a_file_without_tensors_is_empty(save: Callable[..., Path]) -> None:
    assert read_torch(save({"epoch": 1})) == ({}, {})


def test_what_is_no_state_dict_is_refused(torch: Any, save: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear|whole pickled module"):
        read_torch(save(torch.nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match=r"never executes") as error:
        read_torch(save({"weight": torch.ones(2).to_sparse()}))
    assert "_rebuild_sparse_tensor" in str(error.value)
    with pytest.raises(CheckpointError, match="conjugated"):
        read_torch(save({"weight": torch.ones(2, dtype=torch.complex64).conj()}))


# Below, archives are written by hand, from the frozen one.


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = 0) -> Path:
    """Copy the frozen archive with changed entries."""
    with zipfile.ZipFile(FIXTURES / "zip.bin") as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            changed = change(name.partition("/")[2], old.read(name))
            if changed is not None:
                new.writestr(name, changed)
    return path


def test_big_endian_archives(tmp_path: Path) -> None:
    def swap(name: str, data: bytes) -> bytes:
        if name == "byteorder":
            return b"big"
        if not name.startswith("data/"):
            return data
        return np.frombuffer(data, "<u2" if len(data) == 32 else "<u4").byteswap().tobytes()

    swapped, aliases = read_torch(rewrite(tmp_path / "big.bin", swap))
    tensors, expected_aliases = read_torch(FIXTURES / "zip.bin")
    assert aliases == expected_aliases
    for name, tensor in tensors.items():
        for step in (None, 5):
            assert content(swapped[name], step) == content(tensor)


def test_archives_of_other_zip_writers(tmp_path: Path) -> None:
    tensors, aliases = read_torch(rewrite(tmp_path / "a.bin", lambda name, data: data))
    assert aliases and len(tensors) == 3
    assert content(tensors["model.up.weight"]) == VALUES("model.up.weight").tobytes()


@pytest.mark.parametrize(
    ("change", "compression", "message"),
    [
        (lambda name, data: data, zipfile.ZIP_DEFLATED, "is compressed"),
        (lambda name, data: None if name == "data.pkl" else data, 0, "without a data.pkl"),
        (lambda name, data: None if name == "data/1" else data, 0, "no entry 'zip/data/1'"),
        (lambda name, data: data[:-1] if name == "data/1" else data, 0, "'model.up.weight' reaches beyond"),
        (lambda name, data: b"middle" if name == "byteorder" else data, 0, "byte order"),
        (lambda name, data: data[:50] if name == "data.pkl" else data, 0, "truncated"),
    ],
)
def test_damaged_archives(
    tmp_path: Path, change: Callable[[str, bytes], bytes | None], compression: int, message: str
) -> None:
    path = rewrite(tmp_path / "x.bin", change, compression)
    with pytest.raises(CheckpointError, match=message) as error:
        read_torch(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("at", "changed"),
    [(6, b"\x01\x00"), (8, b"\x08\x00"), (14, b"\1\2\3\4"), (18, b"\1\0\0\0"), (22, b"\1\0\0\0"), (30, b"Z")],
    ids=["encrypted", "compressed", "checksum", "packed size", "size", "name"],
)
def test_headers_that_contradict_the_directory(tmp_path: Path, at: int, changed: bytes) -> None:
    """Readers that go by one or the other would see two different models."""
    path = rewrite(tmp_path / "x.bin", lambda name, data: data)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("zip/data/1").header_offset
    damaged = bytearray(path.read_bytes())
    damaged[start + at : start + at + len(changed)] = changed
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="'zip/data/1' is something else by its own header"):
        read_torch(path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02N.")
        archive.writestr("x/constants.pkl", b"\x80\x02N.")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_torch(path)


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_every_truncation_is_refused(tmp_path: Path, form: str) -> None:
    whole = (FIXTURES / f"{form}.bin").read_bytes()
    path = tmp_path / "x.bin"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_torch(path)


def test_pointers_and_strangers(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_torch(path)
    for stranger in (b"", b"<html>", b"PK\3\4", b"\x80\x02K\x01."):
        path.write_bytes(stranger)
        with pytest.raises(CheckpointError):
            read_torch(path)
    with pytest.raises(CheckpointError):
        read_torch(tmp_path / "missing.bin")


def old_stream(view: bytes, count: int, stored: bytes) -> bytes:
    """A stream as torch 0.4 wrote it: persistent ids of six parts, and views of storages."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("7") + text("cpu") + b"K\x06"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + view + b"tQK\x01K\x02\x85K\x01\x85tR"
    magic = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    return b"".join(
        [
            b"\x80\x02\x8a\x0a" + magic + b".",
            b"\x80\x02M\xe9\x03.",
            b"\x80\x02}.",
            b"\x80\x02}" + text("weight") + tensor + b"s.",
            b"\x80\x02]" + text("7") + b"a.",
            count.to_bytes(8, "little") + stored,
        ]
    )


def test_streams_of_old_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    stored = np.arange(6, dtype="<f4")
    for view, expected in ((b"N", stored[1:3]), (b"(X\x01\x00\x00\x008K\x02K\x03t", stored[3:5])):
        path.write_bytes(old_stream(view, 6, stored.tobytes()))
        tensors, _ = read_torch(path)
        assert content(tensors["weight"]) == expected.tobytes()
    path.write_bytes(old_stream(b"(X\x01\x00\x00\x008K\x04K\x03t", 6, stored.tobytes()))
    with pytest.raises(CheckpointError, match="beyond its storage"):
        read_torch(path)
    for count, length in ((7, 28), (6, 20), (2**63 - 1, 24)):
        path.write_bytes(old_stream(b"N", count, bytes(length)))
        with pytest.raises(CheckpointError):
            read_torch(path)


def test_only_headers_are_read(torch: Any, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({f"layer.{number}": torch.zeros(1 << 16) for number in range(64)})
    read = 0
    real = OpenFile.read

    def count(file: OpenFile, offset: int, buffer: memoryview) -> None:
        nonlocal read
        read += len(buffer)
        real(file, offset, buffer)

    monkeypatch.setattr(OpenFile, "read", count)
    tensors, _ = read_torch(path)
    assert math.fsum(tensor.nbytes for tensor in tensors.values()) == 64 << 18
    assert read < 1 << 20


def test_saving_to_memory_names_the_archive_differently(torch: Any, tmp_path: Path) -> None:
    stream = io.BytesIO()
    state = {"weight": torch.randn(3)}
    torch.save(state, stream)
    path = tmp_path / "x.bin"
    path.write_bytes(stream.getvalue())
    check(path, state)
