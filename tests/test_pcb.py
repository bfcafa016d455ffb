"""pcb, whose scores are measured of every model: as its paper defines it, to the same bits on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from driving import FLOATS, drive, load, store
from test_array import same_values

from modelfuse.dtypes import BF16, F32, DType
from modelfuse.kernels import Work
from modelfuse.kernels.arrays.arithmetic import CHUNK
from modelfuse.kernels.arrays.numpy import NumpyLibrary
from modelfuse.kernels.backends import Device, choose
from modelfuse.kernels.kernel import ArrayKernel, Kernel
from modelfuse.methods import registry

Array = np.ndarray[Any, Any]


def pcb(differences: list[Array], keep: float) -> Array:
    """By its definition, with numpy's own functions."""
    stack = np.stack(differences)
    size = np.abs(stack)
    capped = np.minimum(size, np.quantile(size, 0.999, axis=1, keepdims=True)) ** 2
    within = np.exp(len(stack) * capped / np.maximum(capped.max(1, keepdims=True), 1e-30))
    between = np.tanh(stack * stack.sum(0) / max((stack**2).mean(), 1e-30))
    score = within / within.max(1, keepdims=True) * between
    edge = np.quantile(score, 1 - keep, axis=1, keepdims=True)
    top = np.maximum(score.max(1, keepdims=True), 1e-30)
    weights = np.where(score >= edge, np.clip(score / top, 0, None), 0)
    result: Array = (stack * weights).sum(0) / np.maximum(weights.sum(0), 1e-12)
    return result


def values_of(models: int, size: int, seed: int) -> list[Array]:
    draw = np.random.default_rng(seed)
    base, common = draw.normal(size=size), draw.normal(size=size)
    found = [base + 0.1 * (common + draw.normal(size=size)) * draw.gamma(1, 1, size) for _ in range(models)]
    for each in found:
        np.copyto(each, base, where=draw.random(size) < 0.2)
    return [*found, base]


def work_of(stored: list[Array], kind: DType, keep: float = 0.2) -> Work:
    models = len(stored) - 1
    method = registry.apply(None, registry.COMBINATIONS["pcb"], (1 / models,) * models, {"pcb_keep": keep})
    return Work("w", stored[0].size, (kind,) * len(stored), True, kind, method, shape=(stored[0].size,))


def merged(kernel: Kernel, work: Work, stored: list[Array], spans: tuple[int, ...] = (), step: int = CHUNK) -> Array:
    with kernel.running(), np.errstate(all="ignore"):
        return drive(work, stored, spans, step, procedure=kernel.merge(work))[0]


def numpy_kernel(room: int = 32_000_000, most: int = 4 * CHUNK) -> ArrayKernel:
    return ArrayKernel(NumpyLibrary(room, most))


@pytest.mark.parametrize("keep", [0.2, 0.9, 1.0])
@pytest.mark.parametrize(("models", "size"), [(1, 300), (2, 7), (3, 2000), (8, 400)])
def test_it_is_what_is_defined(models: int, size: int, keep: float) -> None:
    for name in ("float64", "float32"):
        stored = [store(each, FLOATS[name]) for each in values_of(models, size, models)]
        exact = [load(each, FLOATS[name], name).astype(np.float64) for each in stored]
        theirs = exact[-1] + pcb([each - exact[-1] for each in exact[:-1]], keep)
        ours = merged(numpy_kernel(), work_of(stored, FLOATS[name], keep), stored)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def test_all_backends_merge_to_the_same_bits() -> None:
    stored = [store(each, BF16) for each in values_of(2, 80_037, 1)]
    work = work_of(stored, BF16)
    expected = merged(numpy_kernel(), work, stored, step=4 * CHUNK)
    assert merged(numpy_kernel(1, CHUNK), work, stored, (CHUNK,), CHUNK).tobytes() == expected.tobytes()
    for tensor_type in ("pt", "pd"):
        pytest.importorskip({"pt": "torch", "pd": "paddle"}[tensor_type])
        same_values(merged(choose(Device(tensor_type)), work, stored, (CHUNK,)), expected, tensor_type)


def test_models_that_equal_the_base_and_values_that_are_not_finite() -> None:
    base = store(np.random.default_rng(0).normal(size=50), F32)
    assert merged(numpy_kernel(), work_of([base] * 3, F32), [base] * 3).tobytes() == base.tobytes()
    stored = [store(each, F32) for each in values_of(2, 50, 0)]
    stored[0][7] = np.nan
    assert np.isnan(merged(numpy_kernel(), work_of(stored, F32), stored)[7])
