"""The benchmark's configurations: each method's is one that both tools read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from modelfuse.recipe.arcee.documents import read_configurations
from modelfuse.recipe.arcee.methods import METHODS

pytest.importorskip("psutil", reason="needs psutil, which the benchmarks measure with")
sys.path.insert(0, str(ROOT / "benchmarks"))

from configurations import WHOLE, configuration


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_configuration(method: str) -> None:
    assert method in WHOLE
    read = read_configurations(json.dumps(configuration(method, Path("/models"), 24))).result
    assert read.merge_method == method
    assert not read.notes
