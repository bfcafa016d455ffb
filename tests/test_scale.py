"""The model of cost, against numbers worked out by hand; and models of any size for the benchmarks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("psutil", reason="needs psutil, which the benchmarks measure with")
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale
from costs import Constants, Machines, Merge, Method, cost
from reference import Shape
from sizes import PLANNED, write_models

import modelfuse

ROUND = Constants(
    methods={"once": Method(0.5, 0.25, 1, False, 0.01), "twice": Method(1.0, 2.0, 2, True, 0.01)},
    start=1.0,
    joining=3.0,
    plan=0.001,
    handling=0.5,
    group=1e9,
)
ONE = Machines(number=1, cores=10, read=2.0, write=4.0, network=5.0)


def test_one_machine_waits_for_its_disk() -> None:
    """Two models of 10 G parameters: 40 GB read at 2 GB/s, 20 GB written at 4 GB/s."""
    found = cost(Merge("once", 10e9, 2, base=False, tensors=100), ONE, ROUND)
    # 10 G × (0.5 + 2 × 0.25) ns and 60 GB × 0.5 ns are 40 s of a core.
    assert found.overlapping == pytest.approx({"reading": 20.0, "writing": 5.0, "computing": 4.0, "giving": 0.0})
    assert found.binding == "reading"
    # 1 s to start, 200 headers' entries of 1 ms each, and the longest term.
    assert found.seconds == pytest.approx(1.0 + 0.2 + 20.0)


def test_a_second_reading_costs_one_machine_its_cores_only() -> None:
    """Two models and a base: 60 GB come from the disk, 120 GB through the cores, which also write 20."""
    found = cost(Merge("twice", 10e9, 2, base=True), ONE, ROUND)
    assert found.reading == pytest.approx(30.0)
    assert found.computing == pytest.approx((50 + 70) / 10)
    slow = cost(Merge("twice", 10e9, 2, base=True), replace(ONE, cores=2), ROUND)
    assert slow.binding == "computing"
    assert slow.computing == pytest.approx(60.0)


def test_several_machines_fetch_the_second_reading_too() -> None:
    """Four machines receive 20 GB/s together, not what their disks give."""
    found = cost(Merge("twice", 10e9, 2, base=True), replace(ONE, number=4), ROUND)
    assert found.overlapping == pytest.approx({"reading": 6.0, "writing": 1.0, "computing": 3.0, "giving": 1.4})
    assert found.start == 4.0


def test_shared_storage_has_a_limit_of_its_own() -> None:
    merge = Merge("twice", 10e9, 2, base=True)
    limited = cost(merge, replace(ONE, number=4, storage=8.0), ROUND)
    assert [limited.reading, limited.writing] == pytest.approx([15.0, 2.5])
    assert cost(merge, replace(ONE, number=4, storage=100.0), ROUND) == cost(merge, replace(ONE, number=4), ROUND)
    assert cost(merge, replace(ONE, storage=1.0), ROUND) == cost(merge, ONE, ROUND)


def test_a_gpu_takes_the_arithmetic_and_its_bus_the_bytes() -> None:
    merge = Merge("twice", 10e9, 2, base=True)
    assert cost(merge, replace(ONE, pcie=3.0), ROUND).computing == pytest.approx(40.0)
    # Over a fast bus, what the cores still do is longer: 140 GB × 0.5 ns on ten of them.
    assert cost(merge, replace(ONE, pcie=60.0), ROUND).computing == pytest.approx(7.0)


def test_a_prediction_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """3.2 TB at 7 GB/s are 457 s, whatever the cores do."""
    words = ["--parameters", "400e9", "--disk", "7", "--cores", "64", "--machines", "1", "--methods", "linear"]
    assert scale.main(["predict", *words]) == 0
    said = capsys.readouterr().out
    assert "457" in said
    assert "reading" in said


def test_the_sizes_are_those_of_their_names() -> None:
    parameters = {name: shape.parameters() for name, shape in PLANNED.items()}
    assert parameters["405B"] == pytest.approx(405e9, rel=0.01)
    assert parameters["1T"] == pytest.approx(1e12, rel=0.05)
    assert parameters["1T of experts"] == pytest.approx(1e12, rel=0.05)
    assert len(PLANNED["1T of experts"].tensors()) > 200_000


@pytest.mark.parametrize("dense", [True, False])
def test_models_are_written_that_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    """Several shards, of the size that they are meant to have; only what is dense takes room."""
    monkeypatch.setattr("sizes.SHARD_BYTES", 400_000)
    monkeypatch.setattr("sizes.BLOCK", 1 << 10)
    shape = Shape(hidden=64, intermediate=128, layers=4, heads=4, vocabulary=500, narrow=32, experts=3)
    write_models(tmp_path, ["base", "a", "b"], shape, dense)
    plan = modelfuse.check(model_path_list=[tmp_path / "a", tmp_path / "b"], base_model_path=tmp_path / "base")
    assert sum(tensor.size for tensor in plan.tensors) == shape.parameters()
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    same = {name: (tmp_path / name / "model-00001-of-00003.safetensors") for name in ("base", "a")}
    assert (same["a"].read_bytes() != same["base"].read_bytes()) is dense
