"""How long methods of whole matrices are expected to take, as `check` tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Said, make_model

import modelfuse as package
from modelfuse.cli.units import duration
from modelfuse.kernels import matrix_time
from modelfuse.kernels.matrices import Matrices
from modelfuse.kernels.matrix_time import Computation, computation_of, expected
from modelfuse.methods import registry

Run = Callable[..., Said]


def method(name: str, norm: float | None = None) -> Any:
    return registry.apply(None, registry.COMBINATIONS[name], (0.5, 0.5), {}, norm=norm)


def test_products_and_decompositions_are_counted() -> None:
    """Gram matrices, of which half is computed, decompositions, and the result; and elements that are read."""
    cut, product, square = Matrices(1, 60, 40), 2.0 * 60 * 40 * 40, 2.0 * 40**3
    read = matrix_time.ELEMENT * 60 * 40 * 3 * 2
    work = {}
    for name in ("iso_c", "swudi", "tsv_m", "ridge"):
        how = registry.COMBINATIONS[name].matrix
        assert how is not None
        work[name] = how.work(2) * square + read
    assert computation_of(cut, method("iso_c"), 2) == Computation(1.65 * product + work["iso_c"], 1, 40)
    for norm in (None, 0.6):  # The result is held, so that it is computed once.
        assert computation_of(cut, method("swudi", norm), 2).operations == pytest.approx(3.3 * product + work["swudi"])
        assert computation_of(cut, method("ridge", norm), 2).operations == pytest.approx(4.3 * product + work["ridge"])
        assert computation_of(cut, method("tsv_m", norm), 2).operations == pytest.approx(4.3 * product + work["tsv_m"])
    experts = Matrices(8, 60, 40, parts=(((0, 30),), ((30, 30),)))
    assert computation_of(experts, method("iso_c"), 2)[1:] == (16, 30)


def test_a_result_that_is_not_held_is_computed_twice_for_its_norm() -> None:
    cut, product, square = Matrices(1, 400_000, 4000), 2.0 * 400_000 * 4000**2, 2.0 * 4000**3
    more = {"iso_c": square, "swudi": 2 * product, "ridge": 2 * product, "tsv_m": 4 * square}
    for name, again in more.items():
        once, twice = (computation_of(cut, method(name, norm), 2).operations for norm in (None, 0.6))
        assert twice - once == pytest.approx(again)


def test_workers_share_tensors_but_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_time, "rate", lambda: 1e9)
    many = [Computation(1e9, 1, 8)] * 8
    assert expected(many, 1) == matrix_time.Expected(8, 8, 8)
    assert expected(many, 4) == matrix_time.Expected(2, 8, 8)
    large = expected([*many, Computation(6e9, 2, 64)], 4)
    assert large is not None
    assert (large.seconds, large.solved, large.largest) == (6, 10, 64)
    assert expected([], 4) is None


def test_the_rate_is_that_of_products() -> None:
    assert 1e7 < matrix_time.rate() < 1e13
    assert matrix_time.rate() == matrix_time.rate()


def test_check_tells(tmp_path: Path, modelfuse: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_time, "rate", lambda: 100.0)
    folders = []
    for seed, name in enumerate(("base", "A", "B")):
        draw = np.random.default_rng(seed)
        tensors = {f"model.layers.{layer}.mlp.up_proj.weight": draw.standard_normal((20, 10)).astype(np.float32)
                   for layer in range(3)}  # fmt: skip
        folders.append(make_model(tmp_path / name, tensors))
    request = ("check", "--base_model_path", folders[0], "--model_path_list", *folders[1:], "--n_process", 1)
    said = modelfuse(*request, "--merge_method", "ridge")
    assert said.status == 0, said.err
    plan = package.check(merge_method="ridge", base_model_path=folders[0], model_path_list=folders[1:], n_process=1)
    assert plan.expected is not None
    assert f"about {duration(plan.expected.seconds)}: 3 decompositions of up to 10²" in said.out
    assert "decomposition" not in modelfuse(*request, "--merge_method", "linear").out
