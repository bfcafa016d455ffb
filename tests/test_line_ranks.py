"""Ranks within lines by compiled loops: which elements are kept is what arrays say, bit for bit."""

from __future__ import annotations

import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driving import FLOATS, drive, store, walk
from test_arcee_methods import numpy_kernel

from modelfuse.dtypes import DType
from modelfuse.kernels import Extent, Work, steps_of
from modelfuse.kernels import line_marks as limits
from modelfuse.kernels.arrays.arithmetic import CHUNK
from modelfuse.kernels.compiled import line_ranks
from modelfuse.kernels.compiled.backend import CompiledBackend
from modelfuse.kernels.compiled.passes import Combine
from modelfuse.kernels.kernel import CompiledKernel
from modelfuse.kernels.line_marks import can_mark, known_bytes, marking_bytes
from modelfuse.kernels.lines import Lines
from modelfuse.methods import arcee

Array = np.ndarray[Any, Any]
EACH = ({"weight": 0.5, "density": 0.5, "epsilon": 0.3}, {"weight": 0.3, "density": 0.7}, {"weight": 0.4})
RANDOM = np.random.default_rng(5)


def normal(shape: tuple[int, ...]) -> Array:
    return RANDOM.normal(size=shape)


def near(shape: tuple[int, ...]) -> Array:
    """Most magnitudes are nearly equal, as after one step of an optimizer: they have to be sorted."""
    return np.sign(normal(shape)) * (1 + RANDOM.random(shape) * 1e-3) * np.where(RANDOM.random(shape) < 0.1, 1e-9, 1e-3)


def tied(shape: tuple[int, ...]) -> Array:
    """A few magnitudes, many of them zero."""
    return RANDOM.integers(-3, 4, shape) / 8.0


def tiny(shape: tuple[int, ...]) -> Array:
    """Subnormal numbers, zeros and large ones."""
    return np.where(RANDOM.random(shape) < 0.5, 3e-45 * RANDOM.integers(0, 9, shape), normal(shape) * 1e30)


def not_finite(shape: tuple[int, ...]) -> Array:
    values = normal(shape)
    values.ravel()[::7] = np.nan
    values.ravel()[::31] = np.inf
    return values


def work_of(shape: tuple[int, ...], kind: DType, size: int, rescale: bool = True, name: str = "della") -> Work:
    method = arcee.applied(name, EACH, {"rescale": rescale}, seed=3)
    return Work("w", size, (kind,) * 4, True, kind, method, shape=shape)


def stored_of(shape: tuple[int, ...], values: Any, kind: DType) -> list[Array]:
    base = RANDOM.normal(0, 0.02, shape) if kind is FLOATS["bfloat16"] else np.zeros(shape)
    with np.errstate(all="ignore"):
        return [store((base + values(shape)).ravel(), kind) for _ in range(3)] + [store(base.ravel(), kind)]


@pytest.mark.parametrize(
    ("shape", "values", "dtype"),
    [
        ((70, 1000), normal, "bfloat16"),  # Lines are cut by slices.
        ((70, 1001), normal, "float32"),  # Of odd length, so that two draws of a word are in two lines.
        ((70, 1000), near, "float32"),
        ((20, 4096), near, "float64"),
        ((9, 3000), tied, "float32"),
        ((9, 3000), tiny, "float32"),
        ((9, 3000), not_finite, "float32"),
        ((3, 40000), normal, "bfloat16"),  # Longer than a slice.
        ((2000, 32), tied, "bfloat16"),
        ((2000, 1), normal, "float32"),
        ((5, 90, 77), normal, "float32"),  # Interleaving lines.
        ((50000,), normal, "bfloat16"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_kept_is_what_arrays_keep(shape: tuple[int, ...], values: Any, dtype: str) -> None:
    kind = FLOATS[dtype]
    stored = stored_of(shape, values, kind)
    work = work_of(shape, kind, stored[0].size, rescale=values is not not_finite)
    with np.errstate(all="ignore"):
        expected, _ = drive(work, stored, (), 4 * CHUNK, procedure=numpy_kernel().merge(work))
        for spans, step in (((), 4 * CHUNK), ((CHUNK,) if work.size > CHUNK else (), CHUNK)):
            found, _ = drive(work, stored, spans, step, procedure=CompiledKernel().merge(work))
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("marks", [True, False], ids=["known", "found again"])
def test_loops_that_read_find_the_same(tmp_path: Path, marks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the marks of the first pass are kept for the second one or not."""
    if not marks:
        monkeypatch.setattr(limits, "MOST_KNOWN", 0)
    shape, kind = (90, 1500), FLOATS["bfloat16"]
    stored = stored_of(shape, normal, kind)
    work = work_of(shape, kind, stored[0].size)
    expected, bad = drive(work, stored, (), 4 * CHUNK, procedure=numpy_kernel().merge(work))
    with ExitStack() as files:
        extents = []
        for number, each in enumerate(stored):
            (tmp_path / str(number)).write_bytes(b"offset" + each.tobytes())
            extents.append(Extent(files.enter_context((tmp_path / str(number)).open("rb")).fileno(), 6))
        found, own_bad = drive(work, stored, (), 2 * CHUNK, CompiledKernel().merge(work), extents=extents)
    assert found.tobytes() == expected.tobytes()
    assert own_bad.tolist() == bad.tolist()


def test_counts_of_what_is_not_finite_are_of_one_reading() -> None:
    shape, kind = (40, 1500), FLOATS["float32"]
    stored = stored_of(shape, not_finite, kind)
    work = work_of(shape, kind, stored[0].size, rescale=False)
    with np.errstate(all="ignore"):
        _, expected = drive(work, stored, (), 4 * CHUNK, procedure=numpy_kernel().merge(work))
        _, found = drive(work, stored, (), CHUNK, procedure=CompiledKernel().merge(work))
    assert found.tolist() == expected.tolist()
    assert found[0] > 0


def test_what_was_marked_stays_in_the_process() -> None:
    """Other processes rank again, to the same bits: marks can be larger than the elements of a few spans."""
    shape, kind = (40, 1500), FLOATS["bfloat16"]
    stored = stored_of(shape, normal, kind)
    work, passes = work_of(shape, kind, stored[0].size), list[Any]()
    expected, _ = drive(work, stored, (), CHUNK, procedure=CompiledKernel().merge(work), passes=passes)
    combine = passes[-1][0]
    assert isinstance(combine, Combine)
    assert combine._marker is not None
    assert combine._marker._known
    copy = pickle.loads(pickle.dumps(combine))
    assert copy._marker._known is None
    again = np.zeros_like(expected.view(np.uint8))
    walk(work, stored, copy, 0, work.size, CHUNK, again)
    assert again.tobytes() == expected.tobytes()


def test_slices_are_read_only_where_they_cut_lines() -> None:
    work = work_of((100, 3000), FLOATS["bfloat16"], 300_000)
    lines = Lines.along(work.shape, work.size, 1)
    pass_ = CompiledBackend().fragments(work, lines)
    steps = list(steps_of(pass_, pass_.start(), 0, work.size, 1 << 16))
    assert sum(step.size for step in steps) == lines.cut_by(1 << 16, work.size)
    whole = CompiledBackend().fragments(work, Lines.along((300, 1024), 300 * 1024, 1))
    assert not list(steps_of(whole, whole.start(), 0, 300 * 1024, 1 << 16))


def test_lines_that_are_too_long_are_ranked_by_arrays() -> None:
    work = work_of((2, 300_000), FLOATS["bfloat16"], 600_000)
    assert not can_mark(work.method.chain, Lines.along(work.shape, work.size, 1))
    assert can_mark(work.method.chain, Lines.along((600, 1000), work.size, 1))


def test_the_memory_of_marking_is_what_is_allocated() -> None:
    work = work_of((1000, 9000), FLOATS["bfloat16"], 9_000_000)
    lines = Lines.along(work.shape, work.size, 1)
    buffers = line_ranks.LineBuffers.of(3, 4, work.compute, lines.length, lines.group)
    allocated = sum(each.nbytes for each in buffers if each.base is None)
    expected = marking_bytes(work, lines, 1 << 20) - known_bytes(work) - 3 * (1 << 20)
    assert allocated <= expected < 1.5 * allocated
    assert known_bytes(work) == 3 * 9_000_000 // 8
