"""Paddle's files: real ones kept as fixtures, numpy arrays of all kinds, and Paddle itself if it is there."""

from __future__ import annotations

import pickle
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfuse.checkpoints.formats import paddle_tensors
from modelfuse.checkpoints.formats.paddle_reader import read_paddle
from modelfuse.checkpoints.formats.paddle_tensors import JoinedTensor, TextTensor
from modelfuse.checkpoints.tensors import StoredTensor
from modelfuse.checkpoints.views.strided import ReorderedTensor, StridedTensor
from modelfuse.errors import CheckpointError

FIXTURES = Path(__file__).parent / "fixtures" / "paddle"
MAKE = runpy.run_path(str(FIXTURES / "make.py"))
DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1", "c8"]
NAMES = {"u2": "BF16", "f4": "F32", "c8": "C64", "b1": "BOOL", "i8": "I64"}


def content(tensor: StoredTensor, step: int | None = None) -> bytes:
    """The bytes of a tensor, read so many elements at a time."""
    step = step or max(tensor.size, 1)
    data = bytearray(tensor.nbytes)
    with tensor.open() as read:
        for start in range(0, tensor.size, step):
            begin = tensor.dtype.nbytes(start)
            read(start, memoryview(data)[begin : begin + tensor.dtype.nbytes(step)])
    return bytes(data)


def little(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes("C")


def save(path: Path, value: object, protocol: int) -> Path:
    path = path / "model_state.pdparams"
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def check(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, StoredTensor]:
    tensors, aliases = read_paddle(path)
    assert aliases == {}
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        stored = tensors[name]
        assert (stored.name, stored.shape) == (name, array.shape)
        assert stored.dtype.name == NAMES.get(array.dtype.str[1:], stored.dtype.name)
        assert stored.dtype.bytes == array.dtype.itemsize
        for step in (None, 3):
            assert content(stored, step) == little(array), (name, step)
    return tensors


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.pdparams")), ids=lambda path: path.stem)
def test_files_written_by_paddle(path: Path) -> None:
    tensors, aliases = read_paddle(path)
    names = set(MAKE["NAMES"]) - ({"nothing"} if path.stem.startswith("dense") else set())
    assert aliases == {}
    assert set(tensors) == names
    for name, stored in tensors.items():
        expected = MAKE["values"](name)
        assert stored.shape == expected.shape
        if name == "norm.weight":
            assert stored.dtype.name == "BF16"
            expected = (expected.view("<u4") >> 16).astype("<u2")
        for step in (None, 1, 7):
            assert content(stored, step) == expected.tobytes()
    sliced = isinstance(tensors["linear.weight"], JoinedTensor)
    assert sliced == path.stem.startswith("slices")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_type_and_order(tmp_path: Path, protocol: int) -> None:
    random = np.random.RandomState(0)
    arrays = {}
    for code in DTYPES:
        bits = random.bytes(15 * np.dtype(code).itemsize)
        array = np.frombuffer(bits, code) if code != "b1" else np.arange(15) % 2 == 1
        arrays[code] = array.reshape(3, 5)
        arrays[f"{code} fortran"] = np.asfortranarray(arrays[code])
        arrays[f"{code} 3d"] = np.asfortranarray(array[:12].reshape(2, 3, 2))
        arrays[f"{code} big-endian"] = arrays[code].astype(arrays[code].dtype.newbyteorder(">"))
    arrays["scalar"] = np.array(3.5)
    arrays["empty"] = np.empty((0, 3), "f4")
    arrays["large"] = random.standard_normal((64, 9)).astype("f4")
    arrays["large fortran"] = np.asfortranarray(arrays["large"])
    arrays["large big-endian"] = arrays["large"].astype(">f4")
    arrays["row of a large one"] = np.asfortranarray(arrays["large"].reshape(1, -1))
    tensors = check(save(tmp_path, arrays, protocol), arrays)
    kinds = [type(tensors[name]) for name in ("large", "large fortran", "large big-endian")]
    if protocol == 2:
        assert kinds == [TextTensor, ReorderedTensor, ReorderedTensor]
    else:
        assert kinds == [StoredTensor, StridedTensor, StridedTensor]
    assert type(tensors["row of a large one"]) is type(tensors["large"])


@settings(max_examples=60, deadline=None)
@given(
    protocol=st.integers(2, 5),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    code=st.sampled_from(DTYPES[:-2]),
    seed=st.integers(0, 2**31),
    step=st.integers(1, 50),
)
def test_any_array_comes_out_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    protocol: int,
    shape: tuple[int, ...],
    code: str,
    seed: int,
    step: int,
) -> None:
    size = int(np.prod(shape))
    bits = np.random.RandomState(seed).bytes(size * np.dtype(code).itemsize)
    array = np.frombuffer(bits, code).reshape(shape)
    path = save(tmp_path_factory.mktemp("any"), {"x": array, "y": ("name", array.T)}, protocol)
    tensors, _ = read_paddle(path)
    assert content(tensors["x"], step) == array.tobytes()
    assert content(tensors["y"], step) == array.T.tobytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_one_array_under_two_names(tmp_path: Path, protocol: int) -> None:
    tied = np.arange(6, dtype="f4")
    other = tied.copy()
    state = {"lm_head.weight": tied, "embed_tokens.weight": tied, "other": other, "again": other}
    tensors, aliases = read_paddle(save(tmp_path, state, protocol))
    assert aliases == {"lm_head.weight": "embed_tokens.weight", "again": "other"}
    assert list(tensors) == ["embed_tokens.weight", "other"]


def test_equal_bytes_are_not_the_same_tensor(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        state = {name: np.zeros(1, "u1") for name in "abc"}
        assert read_paddle(save(tmp_path, state, protocol))[1] == {}


def test_other_entries_are_passed_over(tmp_path: Path) -> None:
    state = {
        "StructuredToParameterName@@": {"weight": "linear_0.w_0"},
        "weight": np.ones(3, "f4"),
        "step": 5,
        "note": "x" * 3000,
        "number": np.float32(2),
        "list": [1, (2, {3})],
    }
    check(save(tmp_path, state, 4), {"weight": np.ones(3, "f4")})


def test_no_array_is_left_out_silently(tmp_path: Path) -> None:
    array = np.ones(3, "f4")
    for value in ({"a": array, "b": [array]}, {"a": {"x": array}, "b": {"x": array.copy()}}):
        with pytest.raises(CheckpointError, match="tensors in several dicts"):
            read_paddle(save(tmp_path, value, 4))
    check(save(tmp_path, {"model": {"x": array}, "optimizer": {"m": array.copy()}}, 4), {"x": array})


def test_types_that_are_no_tensors(tmp_path: Path) -> None:
    for array in (np.array(["a"]), np.array([b"abc"]), np.zeros(2, "i4,f4"), np.zeros(2, "c16")):
        with pytest.raises(CheckpointError):
            read_paddle(save(tmp_path, {"x": array}, 4))


# Text


def test_text_is_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle_tensors, "_PIECE", 1000)
    array = np.random.RandomState(0).bytes(40_000)
    tensor = read_paddle(save(tmp_path, {"x": np.frombuffer(array, "u1")}, 2))[0]["x"]
    assert isinstance(tensor, TextTensor)
    ranges = [(int(a), int(n)) for a, n in np.random.RandomState(1).randint(0, 20_000, (40, 2))]
    with tensor.open() as read, ThreadPoolExecutor(4) as pool:

        def read_one(bounds: tuple[int, int]) -> bytes:
            buffer = bytearray(bounds[1])
            read(bounds[0], memoryview(buffer))
            return bytes(buffer)

        for (start, size), part in zip(ranges, pool.map(read_one, ranges), strict=True):
            assert part == array[start : start + size]
    assert content(tensor, 777) == array


@pytest.mark.parametrize(
    ("old", "new"),
    [("é" * 2000, "é" * 1500 + "e" * 1000), ("é" * 2000, "ł" * 2000), ("e" * 2000, "é" * 1000)],
)
def test_text_of_the_wrong_length_or_kind(tmp_path: Path, old: str, new: str) -> None:
    array = np.frombuffer(old.encode("latin-1"), "u1")
    path = save(tmp_path, {"x": array}, 2)
    whole = path.read_bytes()
    assert old.encode() in whole
    assert len(old.encode()) == len(new.encode())
    path.write_bytes(whole.replace(old.encode(), new.encode()))
    with pytest.raises(CheckpointError, match="tensor 'x'"):
        content(read_paddle(path)[0]["x"], 500)


# Slices


def cut(array: np.ndarray, sizes: tuple[int, ...]) -> dict[str, Any]:
    parts = np.split(array.flatten(), np.cumsum(sizes)[:-1])
    names = [f"x@@.{number}" for number in range(len(parts))]
    table = {"x": {"OriginShape": array.shape, "slices": names}}
    return {**dict(zip(names, parts, strict=True)), "UnpackBigParamInfor@@": table}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("sizes", [(24,), (10, 10, 4), (1, 0, 23)])
def test_slices_are_joined(tmp_path: Path, protocol: int, sizes: tuple[int, ...]) -> None:
    array = np.arange(24, dtype="f4").reshape(4, 6)
    path = save(tmp_path, {"a": array + 1, **cut(array, sizes)}, protocol)
    check(path, {"a": array + 1, "x": array})


def test_slices_that_do_not_fit(tmp_path: Path) -> None:
    array = np.arange(24, dtype="f4").reshape(4, 6)
    table = cut(array, (10, 14))["UnpackBigParamInfor@@"]
    for change in (
        {"x@@.1": np.ones(13, "f4")},
        {"x@@.1": np.ones(14, "i4")},
        {"x": array},
        {"UnpackBigParamInfor@@": {"x": {**table["x"], "slices": ["x@@.0", "x@@.0"]}}},
        {"UnpackBigParamInfor@@": {"x": {**table["x"], "slices": ["x@@.0", "x@@.7"]}}},
        {"UnpackBigParamInfor@@": {"x": {**table["x"], "slices": []}}},
        {"UnpackBigParamInfor@@": {"x": 3}},
        {"UnpackBigParamInfor@@": 3},
    ):
        with pytest.raises(CheckpointError, match="slice"):
            read_paddle(save(tmp_path, {**cut(array, (10, 14)), **change}, 4))


# Files as such


@pytest.mark.parametrize("stem", ["state-2", "pairs-3", "dense-4"])
def test_every_truncation_is_refused(tmp_path: Path, stem: str) -> None:
    whole = (FIXTURES / f"{stem}.pdparams").read_bytes()
    path = tmp_path / "x.pdparams"
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as error:
            read_paddle(path)
        assert str(path) in str(error.value)


def test_pointers_and_strangers(tmp_path: Path) -> None:
    path = tmp_path / "x.pdparams"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_paddle(path)
    path.write_bytes(b"\0\0\0\0binary")
    with pytest.raises(CheckpointError, match=r"no file that paddle\.save writes"):
        read_paddle(path)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, {"x": np.ones(300, "f4"), "y": np.ones((2, 3), "f4", "F")}, 4)
    tensors, _ = read_paddle(path)
    path.write_bytes(path.read_bytes() + b"x")
    for tensor in tensors.values():
        with pytest.raises(CheckpointError, match="was changed"):
            content(tensor)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_paddle_itself(tmp_path: Path, protocol: int) -> None:
    paddle = pytest.importorskip("paddle", reason="needs paddle, which modelfuse itself does not use")
    paddle.seed(0)
    layer = paddle.nn.Sequential(paddle.nn.Linear(40, 30), paddle.nn.LayerNorm(30))
    state = layer.state_dict()
    state["half"] = paddle.randn([30, 7]).astype("bfloat16")
    state["transposed"] = paddle.randn([5, 6]).T
    path = tmp_path / "model_state.pdparams"
    for value in (state, {**state, "note": "x"}):
        paddle.save(value, str(path), protocol=protocol)
        check(path, {name: np.array(tensor) for name, tensor in state.items()})
