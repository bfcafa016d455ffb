"""Kernels that read files by themselves: what they read is what they would have been given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_model, random_tensors
from definitions import MERGE_METHODS, applied
from driving import FLOATS, GRAIN, Array, drive, store, work_on

from modelfuse.dtypes import BF16, DType
from modelfuse.kernels import Extent, Pass, Unread
from modelfuse.kernels.compiled import direct_reads
from modelfuse.kernels.compiled.backend import merge_procedure
from modelfuse.kernels.compiled.base_distance import measured

SIZE = 5 * GRAIN + 1234
MIXTURES = {
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "mixed": ("bfloat16", "float32", "float16"),
    "float64": ("float64", "bfloat16", "float32"),
}


@contextmanager
def lying(path: Path, stored: Sequence[Array]) -> Iterator[list[Extent]]:
    """Arrays in a file, one after another, beginning anywhere."""
    content, offsets = b"odd", []
    for each in stored:
        offsets.append(len(content))
        content += each.tobytes() + b"!"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield [Extent(descriptor, offset) for offset in offsets]
    finally:
        os.close(descriptor)


def some(dtypes: Sequence[DType], seed: int = 0) -> list[Array]:
    """Two models and a base; the first model is the base but for its last element."""
    random = np.random.default_rng(seed)
    # Numbers that every type holds.
    base, delta = (random.integers(-most, most + 1, SIZE).astype(np.float32) / 512 for most in (100, 27))
    first, second = base.copy(), base + delta
    first[-1] = 1.0
    return [store(values, dtype) for values, dtype in zip((first, second, base), dtypes, strict=True)]


@pytest.mark.parametrize("name", MERGE_METHODS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_passes_read_what_they_would_be_given(tmp_path: Path, mixture: str, name: str) -> None:
    dtypes = [FLOATS[each] for each in MIXTURES[mixture]]
    stored = some(dtypes)
    weights = (0.6, 0.3)
    sparsify_type, merge_type = MERGE_METHODS[name]
    work = work_on(stored, dtypes, applied(merge_type, sparsify_type, weights), True, BF16)
    found = []
    with lying(tmp_path / "file", stored) as extents:
        for places in ((), extents):
            passes: list[tuple[Pass, Any]] = []
            procedure = measured(merge_procedure(work), work)
            out, bad = drive(work, stored, [2 * GRAIN], 2 * GRAIN, procedure, passes, places)
            spans = [span.distances for span in passes[-1][1]]
            distances = [(span.differs.tolist(), span.squares.tolist()) for span in spans]
            found.append((out.tobytes(), bad.tolist(), distances))
    assert found[0] == found[1]
    assert [differs for differs, _ in found[1][2]] == [[False, True], [True, True]]


def test_less_than_all_is_read_at_a_time() -> None:
    files = direct_reads.DirectReads.of(3)
    files.read_from([Extent(0, 0)] * 3, [FLOATS[each] for each in MIXTURES["float64"]])
    window = int(files.slice[1])
    assert 0 < window * 14 <= direct_reads.WINDOW
    assert window % direct_reads.BLOCK == 0
    assert window < SIZE


@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "della"])
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    dtypes = [BF16] * 3
    stored = some(dtypes)
    sparsify_type, merge_type = MERGE_METHODS[name]
    work = work_on(stored, dtypes, applied(merge_type, sparsify_type, (0.5, 0.5)), True, BF16)
    with lying(tmp_path / "file", stored) as extents:
        for lost in (Extent(-1, 0), Extent(extents[1].descriptor, extents[2].offset + 10)):
            with pytest.raises(Unread) as caught:
                drive(work, stored, extents=[extents[0], lost, extents[2]])
            assert caught.value.source == 1


def test_a_file_that_could_not_be_read_once(
    refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate("AB")]

    @contextmanager
    def fail(files: direct_reads.DirectReads, first: int) -> Iterator[None]:
        yield
        if files.slice[1]:  # It reads by itself.
            raise Unread(1)

    monkeypatch.setattr(direct_reads.DirectReads, "at", fail)
    refuse("merge", "--model_path_list", *models, "--output_path", tmp_path / "C",
           says=[models[1] / "model.safetensors", "reading", "failed"], hint="check the disk")  # fmt: skip
