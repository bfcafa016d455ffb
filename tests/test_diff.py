"""``modelfuse diff``: what differs between models, held against plain float64 definitions over whole tensors."""

from __future__ import annotations

import json

from conftest import ROOT
from jsonschema import Draft202012Validator
from msgspec import json as encoder

from modelfuse.cli.diff_document import of_diff
from modelfuse.inspection.diff_result import (
    Change,
    Diff,
    Group,
    Kept,
    NotCompared,
    Pair,
    SideDifference,
    TensorFacts,
)


def example() -> Diff:
    kept = Kept(0.1, 0.1, 0.4, 0.05)
    change = Change(1.0, 0.1, 0.5, 0.0, 0.3, 2, 0, 0.4, (kept,))
    pairs = (
        Pair(0, 1, 0.1, 0.3, 0.5, 0.4, 0.2, 0.01),
        Pair(1, 0, 0.1, 0.3, 0.5, 0.4, None, None),
    )
    group = Group("w", "", 0, "mlp.up_proj", 1, 12, 10.0, 0, (change, change), pairs)
    return Diff(
        "base", True, ("a", "b"), group, (group,), (group,), (group,), (group,),
        (TensorFacts("w", "bfloat16", (3, 4), True),), (NotCompared("v", "only in a"),),
        (SideDifference(0, "config", "rope_theta is another", "rope_theta", "1", "2"),), ("nothing",), False, 1, 0.1,
    )  # fmt: skip


def test_the_document_fits_its_schema() -> None:
    schema = json.loads((ROOT / "docs" / "schemas" / "diff.json").read_text())
    read = json.loads(encoder.encode(of_diff(example())))
    Draft202012Validator(schema).validate(read)
    assert read["document"] == "diff/1"


def test_pairs_are_found_by_their_models() -> None:
    whole = example().whole
    assert [(whole.pair(*each).model, whole.pair(*each).other) for each in ((0, 1), (1, 0))] == [(0, 1), (1, 0)]
