"""Merges that wait for no compiler: numpy's arrays until compiled kernels are at hand, to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, make_model, random_tensors, snapshot
from definitions import MERGE_METHODS, applied, merge_tensor
from driving import drive, work_on
from test_kernels import SOURCES, SPARSIFY_TYPES, a_method, distributions, same_values, some_models

from modelfuse.dtypes import BF16, F32, F64
from modelfuse.kernels import adaptive
from modelfuse.kernels.adaptive import AdaptiveKernel, numpy_kernel, rehearse
from modelfuse.kernels.arrays import plain
from modelfuse.kernels.arrays.passes import Combine as ArrayCombine
from modelfuse.kernels.compiled import base_distance, fp8, low_rank, truncated_svd
from modelfuse.kernels.compiled.base_distance import measured
from modelfuse.kernels.compiled.passes import Combine
from modelfuse.kernels.jit import code_cache
from modelfuse.kernels.jit import compile as compile_module
from modelfuse.kernels.jit.compile import NotCompiledError, announcing, compiling, nothing_compiled


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing was compiled before, nor loaded by this process."""
    from modelfuse.kernels.compiled import generate

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kernels"))
    for each in (generate.kernels_of, generate.merged_kernels, generate.compiled):
        each.cache_clear()
    code_cache._key.cache_clear()
    yield tmp_path / "kernels"
    code_cache._key.cache_clear()


@pytest.mark.parametrize("merge_type", ["linear", "slerp", "ties"])
@pytest.mark.parametrize("sparsify_type", SPARSIFY_TYPES, ids=str)
def test_numpy_gives_the_bits_of_the_compiled_kernels(merge_type: str, sparsify_type: str | None) -> None:
    models = 2 if merge_type == "slerp" else 3
    for number, (sources, has_base) in enumerate([(each, base) for each in SOURCES for base in (False, True)]):
        kinds = (*SOURCES[sources][:models], *([SOURCES[sources][0]] if has_base else []))
        stored = some_models((1, 1000, 4097)[number % 3], kinds, number)
        method = a_method(merge_type, sparsify_type, models, seed=number, epsilon=0.2, rescale=number % 3 > 0)
        work = work_on(stored, kinds, method, has_base, kinds[number % len(kinds)])
        theirs, bad_too = drive(work, stored)
        ours, bad = drive(work, stored, procedure=numpy_kernel().merge(work))
        same_values(ours, theirs)
        assert bad.tolist() == bad_too.tolist()


def distances_of(work: Any, stored: list[Any]) -> list[Any]:
    found: list[tuple[Any, Any]] = []
    drive(work, stored, procedure=measured(numpy_kernel().merge(work), work), passes=found)
    return base_distance.distances([each.distances for each in found[-1][1]])


@pytest.mark.parametrize("sources", SOURCES)
def test_distances_have_the_same_bits(sources: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (*SOURCES[sources], BF16)
    stored = some_models(70_001, kinds, 4)
    for other, kind in enumerate(kinds[1:], 1):  # One equal pair, where types are equal; and the base's equal.
        stored[other] = stored[0].copy() if kind is kinds[0] and other != 2 else stored[other]
    work = work_on(stored, kinds, applied("linear", None, (0.5,) * 3), True, kinds[0])
    theirs = distances_of(work, stored)
    monkeypatch.setattr(base_distance, "measure", lambda *given: plain.measure(*(_value(each) for each in given)))
    assert distances_of(work, stored) == theirs


def _value(given: Any) -> Any:
    return getattr(given, "value", given)


def test_a_slice_without_a_chosen_block_adds_nothing() -> None:
    chosen = plain._chosen(first=plain.BLOCK, count=100, stride=63)
    assert chosen.size == 0
    assert plain._add_squares(2.0, np.ones(100), chosen) == 2.0


def test_low_rank_products_and_8_bit_floats_have_the_same_bits() -> None:
    draw = np.random.default_rng(3)
    left, right = draw.normal(size=(37, 5)).astype("f4"), draw.normal(size=(5, 129)).astype("f4")
    for first, size in ((0, 37 * 129), (200, 1000), (5, 3)):
        ours, theirs = (np.full(size, 0.25, "f4") for _ in range(2))
        plain.add_low_rank(left, right, np.float32(0.3), first, ours, ours)
        low_rank.add_low_rank(left, right, np.float32(0.3), first, theirs)
        assert ours.tobytes() == theirs.tobytes()
    grid = fp8.Grid(10, 12, 4, 5)
    values, scales = draw.normal(size=256).astype("f4"), draw.normal(size=(6, 3)).astype("f4")
    codes = draw.integers(0, 256, 2 * 10 * 12).astype(np.uint8)
    for first, size in ((0, 240), (55, 100)):
        ours, theirs = np.empty(size, "f4"), np.empty(size, "f4")
        own = scales[grid.row_of(first) :]
        plain.expand(codes[first : first + size], values, grid, own, first, ours)
        fp8.expand(codes[first : first + size], values, grid, own, first, theirs)
        assert ours.tobytes() == theirs.tobytes()


def test_decompositions_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(9).normal(size=(23, 40)).astype("f4")
    theirs = truncated_svd.factorize(matrix, 3, 17)
    for name in ("project", "project_back", "orthonormalize", "rotate"):
        monkeypatch.setattr(truncated_svd, name, getattr(plain, name))
    assert [each.tobytes() for each in truncated_svd.factorize(matrix, 3, 17)] == [each.tobytes() for each in theirs]


def last_pass(kernel: AdaptiveKernel, work: Any, stored: list[Any]) -> Any:
    found: list[tuple[Any, Any]] = []
    with kernel.running():
        drive(work, stored, procedure=kernel.merge(work), passes=found)
    return found[-1][0]


def some_work() -> tuple[Any, list[Any]]:
    stored = some_models(2000, (F32,) * 3, 1)
    return work_on(stored, (F32,) * 3, applied("linear", "dare", (0.5, 0.25)), True, F32), stored


@pytest.mark.usefixtures("empty_cache")
def test_small_work_starts_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "Compilation", lambda work: pytest.fail("a process was started"))
    work, stored = some_work()
    assert isinstance(last_pass(AdaptiveKernel("none"), work, stored), ArrayCombine)


@pytest.mark.usefixtures("empty_cache")
def test_large_work_begins_with_numpy_and_goes_on_with_what_another_process_compiles() -> None:
    said: list[str] = []
    work, stored = some_work()
    kernel = AdaptiveKernel("beside")
    with announcing(said.append):
        assert isinstance(last_pass(kernel, work, stored), ArrayCombine)
        deadline = time.monotonic() + 300
        while isinstance(last_pass(kernel, work, stored), ArrayCombine):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert isinstance(last_pass(kernel, work, stored), Combine)
    assert said == [adaptive.SAYS]
    assert isinstance(
        last_pass(AdaptiveKernel("none"), work, stored), Combine
    )  # What is at hand is used for small work.


@pytest.mark.usefixtures("empty_cache")
def test_without_memory_for_another_process_large_work_is_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "Compilation", lambda work: pytest.fail("a process was started"))
    work, stored = some_work()
    kernel = AdaptiveKernel("here")
    assert isinstance(last_pass(kernel, work, stored), Combine)
    assert isinstance(last_pass(AdaptiveKernel("none"), work, stored), Combine)


@pytest.mark.usefixtures("empty_cache")
def test_what_the_other_process_cannot_do_is_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "PROGRAM", "raise SystemExit(1)")
    work, stored = some_work()
    kernel = AdaptiveKernel("beside")
    last_pass(kernel, work, stored)
    deadline = time.monotonic() + 60
    while isinstance(last_pass(kernel, work, stored), ArrayCombine):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("empty_cache")
def test_a_rehearsal_that_may_not_compile_says_so() -> None:
    for dtype in (F32, F64):
        stored = some_models(5, (dtype,) * 2, 1)
        with compiling(False), pytest.raises(NotCompiledError):
            rehearse(work_on(stored, (dtype,) * 2, applied("ties", "trim", (1.0, 1.0)), False, dtype))


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [make_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate("ABX")]


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_without_a_compiler_the_bytes_are_the_same(method: str, pair: list[Path], tmp_path: Path) -> None:
    """As on a platform that numba does not support, or where NUMBA_DISABLE_JIT forbids compiling."""
    words = ["merge", "--merge_method", method, "--base_model_path", pair[2], "--model_path_list", *pair[:2]]
    code = "import sys; sys.modules['numba'] = None; from modelfuse.cli.main import main; sys.exit(main())"
    outputs = []
    for name, start, more in (
        ("with", ["-m", "modelfuse"], {}),
        ("disabled", ["-m", "modelfuse"], {"NUMBA_DISABLE_JIT": "1"}),
        ("absent", ["-c", code], {}),
    ):
        out = tmp_path / name
        command = [sys.executable, "-W", "error", *start, *map(str, [*words, "--output_path", out])]
        environment = {**os.environ, **more}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append({key: value for key, value in snapshot(out).items() if key.endswith(".safetensors")})
    assert outputs[0] == outputs[1] == outputs[2]
    assert call("verify", tmp_path / "absent", "--full").status == 0


def test_numpy_counts_magnitudes_that_strain_tallies() -> None:
    for name, values in distributions(40_000, "float32").items():
        stored = [values.astype("f4"), np.linspace(-1, 1, 40_000, dtype="f4")]
        for sparsify_type in ("trim", "magprune", "breadcrumbs"):
            method = applied("linear", sparsify_type, (1.0, 0.5), reserve_p=0.5, epsilon=0.2)
            work = work_on(stored, [F32] * 2, method, False, F32)
            ours, _ = drive(work, stored, procedure=numpy_kernel().merge(work))
            assert ours.tobytes() == drive(work, stored)[0].tobytes(), name


@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_nan_in_one_model_is_one_in_the_output_of_ties(elect: str, normalize: bool) -> None:
    """As defined, for infinities and differences that overflow too."""
    rows = [[np.nan, 1, 3e38, np.inf, -np.inf, 0], [1, np.nan, 3e38, 1, np.inf, -1], [2, -2, -1, -np.inf, 1, np.nan]]
    stored = [np.array(row, "f4") for row in rows]
    method = applied("ties", None, (1.0, 1.0, 1.0), normalize, ties_elect_type=elect)
    work = work_on(stored, [F32] * 3, method, False, F32)
    with np.errstate(all="ignore"):
        defined = merge_tensor(stored, None, method, "w")
    assert np.isnan(defined[[0, 1, 5]]).all()
    same_values(drive(work, stored)[0], defined)
    same_values(drive(work, stored, procedure=numpy_kernel().merge(work))[0], defined)


def test_merges_at_the_same_time_leave_compiling_allowed() -> None:
    """Whichever of them ends first."""
    one, other = nothing_compiled(), nothing_compiled()
    one.__enter__()
    other.__enter__()
    assert compile_module._forbidding
    one.__exit__(None, None, None)
    assert compile_module._forbidding
    other.__exit__(None, None, None)
    assert not compile_module._forbidding
