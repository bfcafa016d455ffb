"""Matrices in another order: every way of cutting, turning and weaving, over every way of storing, against numpy."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfuse.checkpoints.formats.paddle_reader import read_paddle
from modelfuse.checkpoints.tensors import StoredTensor
from modelfuse.checkpoints.views import strided
from modelfuse.checkpoints.views.rearranged import WovenTensor, view
from modelfuse.checkpoints.views.strided import ReorderedTensor, StridedTensor
from modelfuse.errors import CheckpointError


def content(tensor: StoredTensor, start: int, count: int) -> bytes:
    data = bytearray(tensor.dtype.nbytes(count))
    with tensor.open() as read:
        read(start, memoryview(data))
    return bytes(data)


def stored(folder: Path, array: np.ndarray, how: str) -> StoredTensor:
    """The array in a file: row-major, column-major, big-endian, or as text that has no fixed places."""
    array = np.asfortranarray(array) if how == "fortran" else array
    array = array.astype(array.dtype.newbyteorder(">")) if how == "big" else array
    path = folder / "model_state.pdparams"
    path.write_bytes(pickle.dumps({"a": array}, 2 if how == "text" else 4))
    return read_paddle(path)[0]["a"]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), how=st.sampled_from(["plain", "fortran", "big", "text"]), seed=st.integers(0, 99))
def test_any_part_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, how: str, seed: int
) -> None:
    groups, period, inner = (data.draw(st.integers(1, 5)) for _ in range(3))
    begin = data.draw(st.integers(0, period - 1))
    width = data.draw(st.integers(1, period - begin))
    array = np.random.default_rng(seed).standard_normal((groups * period, inner)).astype(np.float32)
    turned = data.draw(st.booleans())
    tensor = stored(tmp_path_factory.mktemp("t"), array.T.copy() if turned else array, how)
    part = array.reshape(groups, period, inner)[:, begin : begin + width]
    steps = {"g": (groups, period * inner), "w": (width, inner), "i": (inner, 1)}
    if turned:
        steps = {"g": (groups, period), "w": (width, 1), "i": (inner, groups * period)}
    order = data.draw(st.permutations("gwi"))
    dims, strides = zip(*(steps[axis] for axis in order), strict=True)
    expected = part.transpose(["gwi".index(axis) for axis in order])
    made = view(tensor, (expected.size,), dims, strides, begin * (1 if turned else inner))
    start = data.draw(st.integers(0, expected.size - 1))
    count = data.draw(st.integers(1, expected.size - start))
    assert content(made, start, count) == np.ascontiguousarray(expected).tobytes()[4 * start : 4 * (start + count)]
    assert made.files == tensor.files
    if how == "text":
        assert isinstance(made, ReorderedTensor)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.integers(1, 6), widths=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_any_tensors_side_by_side(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, widths: list[int]
) -> None:
    draw = np.random.default_rng(len(widths))
    arrays = [draw.standard_normal((rows, width)).astype(np.float32) for width in widths]
    parts = []
    for array in arrays:
        tensor = stored(tmp_path_factory.mktemp("t"), array.T.copy(), "plain")
        parts.append(view(tensor, array.shape, array.shape, (1, rows)))
    whole = np.concatenate(arrays, axis=1)
    first = parts[0]
    woven = WovenTensor("w", first.dtype, whole.shape, first.file, first.offset, tuple(parts), rows)
    start = data.draw(st.integers(0, whole.size - 1))
    count = data.draw(st.integers(1, whole.size - start))
    assert content(woven, start, count) == whole.tobytes()[4 * start : 4 * (start + count)]
    assert {file.path for file in woven.files} == {part.file.path for part in parts}


def test_what_lies_in_order_is_read_plainly(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    turned = view(stored(tmp_path, array, "fortran"), (3, 4), (3, 4), (1, 3))
    assert type(turned) is StoredTensor
    assert content(turned, 0, 12) == array.T.tobytes()
    lower = view(stored(tmp_path, array, "plain"), (2, 3), (2, 3), (3, 1), 6)
    assert type(lower) is StoredTensor
    assert content(lower, 0, 6) == array[2:].tobytes()
    assert type(view(stored(tmp_path, array, "plain"), (3, 4), (3, 4), (1, 3))) is StridedTensor


def test_no_more_than_some_bytes_are_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small they are: the same elements, from every start."""
    array = np.random.default_rng(0).standard_normal((70, 90)).astype(np.float32)
    tensor = view(stored(tmp_path, array, "plain"), (90, 70), (90, 70), (1, 90))
    expected = array.T.tobytes()
    for most in (4, 1000, 20_000, 1 << 24):
        monkeypatch.setattr(strided, "MOST_READ", most)
        assert tensor.reader_bytes == most
        for step in (array.size, 701, 70):
            found = b"".join(content(tensor, at, min(step, array.size - at)) for at in range(0, array.size, step))
            assert found == expected


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """And no end of the process, as where files are mapped."""
    array = np.random.default_rng(0).standard_normal((70, 90)).astype(np.float32)
    tensor = view(stored(tmp_path, array, "plain"), (90, 70), (90, 70), (1, 90))
    with pytest.raises(CheckpointError, match="in the middle of a tensor"), tensor.open() as read:  # noqa: PT012
        os.truncate(str(tensor.file.path), tensor.offset + 100)
        read(0, memoryview(bytearray(tensor.nbytes)))
