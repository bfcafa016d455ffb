"""Values that are not finite are counted and named; tensors too near to the base or too far from it are listed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STEPS, Said, Stored, array, bf16, call, make_model, read_model
from definitions import applied
from driving import bfloat16, drive, work_on
from msgspec.structs import replace

import modelfuse as package
from modelfuse.dtypes import BF16, F16, F32, F64, DType
from modelfuse.execution import run as running
from modelfuse.execution.report_writer import Outcome, SpanResult
from modelfuse.kernels.compiled import base_distance as module
from modelfuse.kernels.compiled.backend import merge_procedure
from modelfuse.kernels.compiled.base_distance import BLOCK, Distance, distances, measured, stride_of
from modelfuse.methods.applied import Applied

Run = Callable[..., Said]
LINEAR = applied("linear", None, (0.5, 0.5), True)


def measure(
    stored: list[np.ndarray], dtypes: list[DType], method: Applied = LINEAR, deltas: tuple[bool, ...] = (), **how: Any
) -> list[Distance]:
    """The distances that merging finds; the base comes last."""
    work = replace(work_on(stored, dtypes, method, True, BF16), deltas=deltas)
    passes: list[Any] = []
    drive(work, stored, procedure=measured(merge_procedure(work), work), passes=passes, **how)
    return distances([each.distances for each in passes[-1][1]])


def definition(models: list[np.ndarray], base: np.ndarray) -> list[float]:
    """‖x − b‖ / ‖b‖ over the blocks that are chosen, in numpy."""
    stride = stride_of(base.size)
    chosen = np.arange(base.size) // BLOCK % stride == 0
    wide = base[chosen].astype(np.float64)
    return [float(np.linalg.norm(x[chosen].astype(np.float64) - wide) / np.linalg.norm(wide)) for x in models]


def values(size: int, seed: int, spread: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


# Distances


@pytest.mark.parametrize("size", [1, 1000, 5000, 200_001, 1_500_000])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_distances_are_those_of_the_definition(size: int, dtype: DType) -> None:
    base = values(size, 1)
    models = [base + values(size, seed, 10.0**-seed) for seed in (2, 3)]
    stored: list[np.ndarray]
    if dtype is BF16:
        stored = [bfloat16(each) for each in (*models, base)]
        wide = [(each.astype(np.uint32) << np.uint32(16)).view(np.float32) for each in stored]
    else:
        wide = [each.astype(dtype.numpy) for each in (*models, base)]
        stored = wide
    found = measure(stored, [dtype] * 3)
    assert [each.equal for each in found] == [False, False]
    assert [each.relative for each in found] == pytest.approx(definition(wide[:2], wide[2]), rel=1e-12, abs=0)


@pytest.mark.parametrize("steps", [("linear", None), ("slerp", None), ("ties", "trim"), ("linear", "magprune")])
def test_same_numbers_for_any_spans_slices_and_method(steps: tuple[str, str | None]) -> None:
    base = values(700_000, 1)
    stored = [base + values(base.size, 2, 0.1), base.copy(), base]
    whole = measure(stored, [F32] * 3, step=1 << 20)
    assert whole[0].relative == pytest.approx(definition(stored[:1], base)[0], rel=1e-12)
    for spans, step in (([1 << 18, 1 << 19], 1 << 17), ([1 << 15], 1 << 15), ([], 1 << 16)):
        found = measure(stored, [F32] * 3, applied(steps[0], steps[1], (0.5, 0.5), True), spans=spans, step=step)
        assert [each.equal for each in found] == [False, True]
        assert [each.relative for each in found] == pytest.approx([each.relative for each in whole], rel=1e-12, abs=0)
        assert found == measure(stored, [F32] * 3, spans=spans, step=1 << 20)  # Slices change not even the last bit.


@pytest.mark.parametrize("place", [0, 1023, 70_000, 299_999])
@pytest.mark.parametrize("model_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("base_dtype", [F32, BF16], ids=str)
def test_one_element_is_enough_to_differ(place: int, model_dtype: DType, base_dtype: DType) -> None:
    """Also in a block that is not chosen, and where the types are not the same."""
    wide = array(bf16(values(300_000, 1)))
    same = wide.copy()
    same[place] *= 2
    store = {F32: lambda x: x, BF16: bfloat16}
    stored = [store[model_dtype](wide), store[model_dtype](same), store[base_dtype](wide)]
    found = measure(stored, [model_dtype, model_dtype, base_dtype])
    assert [each.equal for each in found] == [True, False]
    assert found[0].relative == 0
    chosen = place // BLOCK % stride_of(wide.size) == 0
    assert (found[1].relative != 0) == chosen


def test_signs_of_zeros_differ() -> None:
    base = np.array([0.0, 1.0], np.float32)
    found = measure([-base * np.array([1, -1], np.float32), base, base], [F32] * 3)
    assert [each.equal for each in found] == [False, True]


def test_models_that_are_differences_already() -> None:
    base = values(5000, 1)
    delta = values(5000, 2, 0.1)
    found = measure([delta, np.zeros_like(delta), base], [F32] * 3, deltas=(True, True))
    assert found[0].relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base), rel=1e-6, abs=0)
    assert found == [found[0]._replace(equal=False), Distance(True, 0.0)]


def test_a_base_of_zeros_has_no_relative_distance() -> None:
    zeros = np.zeros(10, np.float32)
    assert measure([zeros + 1, zeros, zeros], [F32] * 3) == [Distance(False, None), Distance(True, None)]


def test_blocks_that_are_chosen_meet_every_column() -> None:
    """Rows of a power of two would be seen at the same columns again and again, were the stride even."""
    for size in (1 << 17, 1 << 18, 1 << 22, 1 << 24):
        stride = stride_of(size)
        blocks = np.arange(0, size // BLOCK, stride)
        assert set((blocks % 8).tolist()) == set(range(8))
        assert blocks.size * BLOCK >= module.LEAST * 0.6
        assert size < 1 << 23 or blocks.size * BLOCK <= size // 60


# Merges


def many(seed: int, factor: float = 0.01, base: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tensors = {f"layers.{number}.w": random.standard_normal((16, 16)).astype(np.float32) for number in range(9)}
    return {name: base[name] + each * np.float32(factor) for name, each in tensors.items()} if base else tensors


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())
    return content


def test_what_stands_out_is_listed(merge: Run, tmp_path: Path) -> None:
    base = many(0)
    base["ids"] = np.arange(3)
    a, b, c = (many(seed, base={name: base[name] for name in many(0)}) for seed in (1, 2, 3))
    for model in (a, b, c):
        model["ids"] = np.arange(3)
    a["layers.3.w"] = base["layers.3.w"] * np.float32(1.5)
    a["layers.4.w"] = a["layers.5.w"] = base["layers.5.w"]
    a["layers.4.w"] = base["layers.4.w"]
    b["layers.0.w"] = base["layers.0.w"] * np.float32(1.05)  # Five times the median: not far.
    for name, tensors in {"A": a, "B": b, "C": c, "base": base}.items():
        make_model(tmp_path / name, tensors)
    said = merge("--model_path_list", *(tmp_path / name for name in "ABC"), "--base_model_path", tmp_path / "base",
                 "--output_path", tmp_path / "O", "--n_process", 2)  # fmt: skip
    (found,) = report_of(tmp_path / "O")["suspicious"]
    assert found["model"] == str(tmp_path / "A")
    assert found["equal_to_base"] == ["layers.4.w", "layers.5.w"]
    assert list(found["far_from_base"]) == ["layers.3.w"]
    assert found["far_from_base"]["layers.3.w"] == pytest.approx(0.5)
    moved = [name for name in many(0) if name not in found["equal_to_base"]]
    ratios = [np.linalg.norm(a[name] - base[name]) / np.linalg.norm(base[name]) for name in moved]
    assert found["median_relative_distance"] == pytest.approx(np.median(ratios), rel=1e-5)
    (line,) = [line for line in said.out.splitlines() if "the base's" in line]
    assert f"{tmp_path / 'A'}: 2 of 9 tensors equal the base's, 1 of 9 tensors are far from the base's" in line
    assert str(tmp_path / "B") not in line
    assert package.verify(tmp_path / "O", full=True).holds


def test_a_model_that_is_the_base(merge: Run, tmp_path: Path) -> None:
    make_model(tmp_path / "A", many(1))
    make_model(tmp_path / "base", many(0))
    said = merge("--model_path_list", tmp_path / "A", tmp_path / "base", "--base_model_path", tmp_path / "base",
                 "--output_path", tmp_path / "O")  # fmt: skip
    assert f"{tmp_path / 'base'}: all tensors equal the base's" in said.out
    (found,) = report_of(tmp_path / "O")["suspicious"]
    assert (found["far_from_base"], found["median_relative_distance"]) == ({}, None)
    assert found["equal_to_base"] == list(many(0))


@pytest.mark.parametrize("steps", STEPS, ids=" ".join)
def test_every_method_finds_the_same(merge: Run, tmp_path: Path, steps: list[str]) -> None:
    base = many(0)
    models = [many(seed, base=base) for seed in (1, 2)]
    models[1]["layers.2.w"] = base["layers.2.w"] + np.float32(1)
    for name, tensors in zip(("A", "B", "base"), (*models, base), strict=True):
        make_model(tmp_path / name, tensors)
    merge("--model_path_list", tmp_path / "A", tmp_path / "B", "--base_model_path", tmp_path / "base", *steps,
          "--output_path", tmp_path / "O")  # fmt: skip
    (found,) = report_of(tmp_path / "O")["suspicious"]
    assert (found["model"], found["equal_to_base"]) == (str(tmp_path / "B"), [])
    assert list(found["far_from_base"]) == ["layers.2.w"]


def test_without_a_base_or_without_suspicion_nothing_is_said(merge: Run, tmp_path: Path) -> None:
    base = many(0)
    for name, tensors in {"A": many(1, base=base), "B": many(2, base=base), "base": base}.items():
        make_model(tmp_path / name, tensors)
    models = ["--model_path_list", tmp_path / "A", tmp_path / "B"]
    for out, words in (("O", models), ("P", [*models, "--base_model_path", tmp_path / "base"])):
        said = merge(*words, "--output_path", tmp_path / out)
        assert report_of(tmp_path / out)["suspicious"] == []
        assert "the base's" not in said.out
    twins = ["--model_path_list", tmp_path / "A", tmp_path / "A"]
    merge(*twins, "--output_path", tmp_path / "Q")
    assert report_of(tmp_path / "Q")["suspicious"] == []


# Values that are not finite


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Three models of a tensor of two spans, the first two with values that are not finite all over."""
    folder = tmp_path_factory.mktemp("large")
    size = (1 << 22) + 5000
    paths = []
    for seed, (name, step) in enumerate({"A": 1000, "B": 100_000, "base": 0}.items()):
        wide = values(size, seed)
        if step:
            wide[::step] = np.nan
            wide[1::step] = np.inf
        paths.append(make_model(folder / name, {"w": bf16(wide)}))
    return folder, paths


@pytest.mark.parametrize("method", ["linear", "ties", "della", "dare_ties"])
@pytest.mark.parametrize("workers", [1, 3])
def test_they_are_counted_over_the_whole_tensor_in_every_model(
    modelfuse: Run, large: tuple[Path, list[Path]], method: str, workers: int
) -> None:
    folder, paths = large
    size = (1 << 22) + 5000
    counts = [2 * len(range(0, size, step)) for step in (1000, 100_000)]
    said = modelfuse("merge", "--model_path_list", *paths[:2], "--base_model_path", paths[2], "--merge_method", method,
                     "--n_process", workers, "--output_path", folder / "O", "--max_tensor_mem", 0.002)  # fmt: skip
    assert said.status == 2
    whole = (
        f"'w' holds NaN or infinite values: {counts[0]:,} in {paths[0]} and {counts[1]:,} in {paths[1]}, of {size:,}"
    )
    assert whole in said.err
    assert "part" not in said.err
    assert not (folder / "O").exists()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_an_overflow_is_counted_over_the_whole_tensor(refuse: Callable[..., str], tmp_path: Path, dtype: DType) -> None:
    size = (1 << 18) + 9
    big = np.ones(size, np.float32)
    big[::1000] = 3e38 if dtype is BF16 else 6e4
    models = [make_model(tmp_path / name, {"w": big}) for name in "AB"]
    refuse("merge", "--model_path_list", *models, "--weight_list", 1, 1, "--output_dtype", dtype.torch,
           "--output_path", tmp_path / "C", says=["'w'", "overflows", dtype.torch, f"{len(big[::1000]):,} of {size:,}"],
           hint="wider")  # fmt: skip


def test_an_overflow_that_is_let_through_is_reported(merge: Run, tmp_path: Path) -> None:
    tensors: dict[str, Stored | np.ndarray] = {"w": np.array([60000, 1, 60000], np.float16)}
    models = [make_model(tmp_path / name, tensors) for name in "AB"]
    merge("--model_path_list", *models, "--weight_list", 1, 1, "--on_nonfinite", "propagate",
          "--output_path", tmp_path / "C")  # fmt: skip
    assert array(read_model(tmp_path / "C")["w"]).tolist() == [np.inf, 2, np.inf]
    assert report_of(tmp_path / "C")["tensors"]["w"]["nonfinite"] == {"sources": [0, 0], "output": 2}


def test_values_that_are_let_through_are_no_distance(tmp_path: Path) -> None:
    """In a process of its own, where a warning would be an error."""
    base = many(0)
    bad = many(1, base=base)
    bad["layers.1.w"][0, 0] = np.nan
    for name, tensors in {"A": bad, "B": many(2, base=base), "base": base}.items():
        make_model(tmp_path / name, tensors)
    said = call("merge", "--model_path_list", tmp_path / "A", tmp_path / "B", "--base_model_path", tmp_path / "base",
                "--on_nonfinite", "propagate", "--output_path", tmp_path / "O")  # fmt: skip
    assert said.status == 0, said.err
    (found,) = report_of(tmp_path / "O")["suspicious"]
    assert found["far_from_base"] == {"layers.1.w": None}


def test_what_spans_say_is_taken_one_at_a_time(merge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers end spans of one tensor at the same time; what one of them says must not be lost."""
    monkeypatch.setattr(running, "SPAN", 1 << 18)
    models = [make_model(tmp_path / name, {"w": values(6 << 18, seed)}) for seed, name in enumerate("ABZ")]
    inside, most, spans, lock = 0, 0, 0, threading.Lock()
    take = Outcome.take

    def slow(outcome: Outcome, first: int, walked: SpanResult) -> None:
        nonlocal inside, most, spans
        with lock:
            inside += 1
            most, spans = max(most, inside), spans + 1
        time.sleep(0.02)
        take(outcome, first, walked)
        with lock:
            inside -= 1

    monkeypatch.setattr(Outcome, "take", slow)
    merge("--model_path_list", *models[:2], "--base_model_path", models[2], "--n_process", 3,
          "--output_path", tmp_path / "C")  # fmt: skip
    assert spans == 6
    assert most == 1
